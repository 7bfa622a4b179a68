"""Completes texts with a finished run's policy."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.common.types import Prompts
from rlhf_jax.data import pipeline
from rlhf_jax.feedback.records import Prompt
from rlhf_jax.generation.sample import Samples
from rlhf_jax.recipes.finished import Finished
from rlhf_jax.recipes.parts import Parts
from rlhf_jax.recipes.policies import make_sampler
from rlhf_jax.recipes.rewards import load_reward_model, make_score
from rlhf_jax.sharding.mesh import put_batch

Array = jax.Array


class Completion(NamedTuple):
  """One sampled response.

  Attributes:
    prompt: the text that was to be completed.
    sample: the number of the response among those to this prompt, from 0.
    text: the response, special tokens left out.
    tokens: its ids, the stop token included.
    logprobs: their log-probs in nats, at the sampling temperature (at 1 where that is 0).
    finished: whether a stop token ended it; else it was cut at the longest length.
    prompt_tokens: the ids the policy read, `<bos>` included.
    prompt_tokens_cut: how many ids of the prompt did not fit and were left out.
    score: the reward model's, where the run is opened with one.
  """

  prompt: str
  sample: int
  text: str
  tokens: list[int]
  logprobs: list[float]
  finished: bool
  prompt_tokens: list[int]
  prompt_tokens_cut: int
  score: float | None


# (prompts, key, samples a prompt) -> completions, prompt after prompt
Completer = Callable[[Sequence[str], Array, int], list[Completion]]


def make_completer(opened: Finished) -> Completer:
  """What completes a batch of texts by an opened policy, at its config's lengths and settings.

  A response is a function of the parameters, the settings, the key, the prompt's text and the
  number of the response: not of the other prompts of the batch, nor of its place among them.
  (Hardware may round products of other batch sizes otherwise, some 1e-7: enough to part two tokens
  that are as good as equally likely.)
  """
  parts = opened.parts
  assert isinstance(parts, Parts), 'only policies over text are opened without feedback'
  sampler = jax.jit(make_sampler(parts))
  reward_model = load_reward_model(parts)
  score = None if reward_model is None else make_score(reward_model)
  room = parts.config.data.prompt_length - (parts.tokenizer.bos_id is not None)

  def complete(texts: Sequence[str], key: Array, samples: int) -> list[Completion]:
    rows = [(text, number) for text in texts for number in range(samples)]
    columns = pipeline.encode_prompts(
      [Prompt(text) for text, _ in rows], parts.tokenizer, parts.config.data
    )
    prompts: Any = columns.take(np.arange(len(rows)))
    prompts = dataclasses.replace(prompts, index=np.array([_number(*row) for row in rows]))
    with jax.set_mesh(parts.mesh):
      sequences, drawn = sampler(opened.params, put_batch(prompts, parts.mesh), key)
      scores = None if score is None else np.asarray(score(sequences).scores)
    lengths = [len(row) for row in parts.tokenizer.encode_batch([text for text, _ in rows])]
    found = _completions(
      parts.tokenizer.decode, rows, prompts, jax.device_get(drawn), lengths, room
    )
    if scores is None:
      return found
    return [one._replace(score=float(value)) for one, value in zip(found, scores, strict=True)]

  return complete


def best_of(completions: Sequence[Completion], samples: int) -> list[Completion]:
  """Of every `samples` adjacent completions the one with the highest score, the first of equals."""
  groups = [completions[start : start + samples] for start in range(0, len(completions), samples)]
  return [
    max(group, key=lambda one: -math.inf if one.score is None else one.score) for group in groups
  ]


def _number(text: str, sample: int) -> np.int32:
  """What seeds a row's sampling."""
  return np.int32(zlib.crc32(f'{sample}\n{text}'.encode()) & 0x7FFFFFFF)


def _completions(
  decode: Callable[[list[int]], str],
  rows: list[tuple[str, int]],
  prompts: Prompts,
  drawn: Samples,
  lengths: list[int],
  room: int,
) -> list[Completion]:
  found = []
  for row, (text, number) in enumerate(rows):
    mask = drawn.mask[row]
    tokens = drawn.tokens[row][mask].tolist()
    found.append(
      Completion(
        prompt=text,
        sample=number,
        text=decode(tokens),
        tokens=tokens,
        logprobs=drawn.logprobs[row][mask].tolist(),
        finished=bool(drawn.finished[row]),
        prompt_tokens=prompts.tokens[row][prompts.mask[row]].tolist(),
        prompt_tokens_cut=max(lengths[row] - room, 0),
        score=None,
      )
    )
  return found
