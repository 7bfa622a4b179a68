"""Rewards as plain Python functions, for `rollout.rewards`: (prompts, responses) -> numbers."""

from collections.abc import Sequence

WORDS_WANTED = 8


def brevity(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
  """Minus the words beyond eight, as a verifiable reward: 0 for what is short enough."""
  del prompts
  return [-float(max(len(response.split()) - WORDS_WANTED, 0)) for response in responses]
