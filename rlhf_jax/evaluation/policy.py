"""What does the policy do? It answers held-out prompts; the answers are measured."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.common.processes import to_host
from rlhf_jax.common.types import Prompts, Sequences

Array = jax.Array


class Answers(NamedTuple):
  """Sampled responses and whether each stopped by itself, `[B]` bool."""

  sequences: Sequences
  finished: Array


class PolicyProbes(NamedTuple):
  """The functions an evaluation calls; those that do not apply are None.

  Attributes:
    generate: `(policy params, prompts, key) -> Answers`.
    kl: `(policy params, sequences) -> [B]`, the divergence from the reference along each response,
      in nats: the sum over its tokens of the exact KL between next-token distributions. Its mean is
      an unbiased estimate of the sequence KL with less variance than that of log-ratios (Amini et
      al. 2025).
    proxy: `(sequences) -> [B]`, the reward model's scores.
    reward: `(answers) -> [B]`, what the objective pays for them, where that is not the proxy.
    gold: `(prompts, responses)` as texts `-> [B]`, the task's gold reward.
    decode: token ids to text.
  """

  generate: Callable[[Any, Prompts, Array], Answers]
  kl: Callable[[Any, Sequences], Array] | None
  proxy: Callable[[Sequences], Array] | None
  reward: Callable[[Answers], Array] | None
  gold: Callable[[list[str], list[str]], np.ndarray] | None
  decode: Callable[[list[int]], str]


def answer_prompts(
  probes: PolicyProbes, params: Any, key: Array, batches: Iterable[tuple[Prompts, np.ndarray]]
) -> dict[str, np.ndarray]:
  """Samples one response a prompt and measures it.

  Args:
    probes: see there.
    params: the policy's parameters.
    key: the sampling key; a row's sample depends on it and on the prompt's number alone.
    batches: prompts, and `[B]` bool, False at rows that only fill up the last batch.

  Returns:
    arrays with an entry a prompt: 'prompt' and 'response' (texts), 'length' in tokens, 'finished',
    and, where their probes exist, 'kl', 'proxy_reward', 'reward', 'gold_reward'.
  """
  columns: dict[str, list[np.ndarray]] = {}
  for prompts, real in batches:
    answers = probes.generate(params, prompts, key)
    sequences = answers.sequences
    measured: dict[str, Any] = {
      'length': sequences.response_mask.sum(-1),
      'finished': answers.finished,
    }
    if probes.kl is not None:
      measured['kl'] = probes.kl(params, sequences)
    if probes.proxy is not None:
      measured['proxy_reward'] = probes.proxy(sequences)
    if probes.reward is not None:
      measured['reward'] = probes.reward(answers)
    host = to_host((sequences, measured))
    texts = decode_sequences(host[0], probes.decode)
    rows = {name: np.asarray(values) for name, values in host[1].items()}
    rows['prompt'], rows['response'] = np.array(texts[0]), np.array(texts[1])
    if probes.gold is not None:
      rows['gold_reward'] = np.asarray(probes.gold(*texts))
    for name, values in rows.items():
      columns.setdefault(name, []).append(values[real])
  return {name: np.concatenate(parts) for name, parts in columns.items()}


def decode_sequences(
  sequences: Sequences, decode: Callable[[list[int]], str]
) -> tuple[list[str], list[str]]:
  """Prompts and responses of a host batch as texts."""
  prompts = [
    decode(row[mask].tolist())
    for row, mask in zip(
      np.asarray(sequences.prompt), np.asarray(sequences.prompt_mask), strict=True
    )
  ]
  responses = [
    decode(row[mask].tolist())
    for row, mask in zip(
      np.asarray(sequences.response), np.asarray(sequences.response_mask), strict=True
    )
  ]
  return prompts, responses


def wins(arrays: dict[str, np.ndarray], baseline: dict[str, np.ndarray]) -> np.ndarray | None:
  """1 where the policy's answer beats the baseline's, 0.5 at ties, 0 elsewhere.

  The judge is the gold reward where the task has one, else the proxy, else what the objective pays;
  None where there is none of these.
  """
  for judge in ('gold_reward', 'proxy_reward', 'reward'):
    if judge in arrays and judge in baseline:
      return 0.5 * (1 + np.sign(arrays[judge] - baseline[judge]))
  return None
