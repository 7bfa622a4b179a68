"""Completes texts with a finished run's policy."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.common.processes import to_host
from rlhf_jax.common.types import Prompts
from rlhf_jax.data import pipeline
from rlhf_jax.data.texts import encode_contexts
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.feedback.dialogues import Context, text_of
from rlhf_jax.feedback.records import Prompt
from rlhf_jax.generation.samples import Samples
from rlhf_jax.recipes.finished import Finished
from rlhf_jax.recipes.parts import Parts
from rlhf_jax.recipes.policies import make_sampler
from rlhf_jax.recipes.rewards import load_reward_model, make_score
from rlhf_jax.sharding.mesh import put_batch

Array = jax.Array


class Completion(NamedTuple):
  """One sampled response.

  Attributes:
    prompt: the text that was to be completed; a dialogue as the chat template writes it.
    sample: the number of the response among those to this prompt, from 0.
    text: the response, special tokens left out.
    tokens: its ids, the stop token included.
    logprobs: their log-probs in nats, at the sampling temperature (at 1 where that is 0).
    finished: whether a stop token ended it; else it was cut at the longest length.
    prompt_tokens: the ids the policy read, `<bos>` included.
    prompt_tokens_cut: how many ids of the prompt did not fit and were left out.
    prompt_tokens_unknown: how many of those that were read stand for words that are unknown.
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
  prompt_tokens_unknown: int
  score: float | None


# (prompts, key, samples a prompt) -> completions, prompt after prompt
Completer = Callable[[Sequence[Context], Array, int], list[Completion]]


def make_completer(opened: Finished, *, fit: bool = False) -> Completer:
  """What completes a batch of texts by an opened policy, at its config's lengths and settings.

  A prompt is a text or a dialogue, which the tokenizer's chat template writes. A response is a
  function of the parameters, the settings, the key, the prompt and the number of the response: not
  of the other prompts of the batch, nor of its place among them.
  (Hardware may round products of other batch sizes otherwise, some 1e-7: enough to part two tokens
  that are as good as equally likely.)

  With `fit` a batch is as wide as its longest prompt, rounded up to a power of two for the sake of
  compiled programs, and no wider than `data.prompt_length`; else just as wide.
  """
  parts = opened.parts
  assert isinstance(parts, Parts), 'only policies over text are opened without feedback'
  sampler = jax.jit(make_sampler(parts))
  reward_model = load_reward_model(parts)
  score = None if reward_model is None else make_score(reward_model)

  def complete(contexts: Sequence[Context], key: Array, samples: int) -> list[Completion]:
    rows = [(context, number) for context in contexts for number in range(samples)]
    asked, data = [context for context, _ in rows], parts.config.data
    encoded = encode_contexts(asked, parts.tokenizer, data)
    if fit:
      longest = max(2, *(len(prompt.ids) for prompt in encoded))
      width = min(1 << (longest - 1).bit_length(), data.prompt_length)
      data = dataclasses.replace(data, prompt_length=width)
    prompts: Any = pipeline.encode_prompts(
      [Prompt(context) for context in asked], parts.tokenizer, data
    ).take(np.arange(len(rows)))
    seeds = [_number(text_of(context), number) for context, number in rows]
    prompts = dataclasses.replace(prompts, index=np.array(seeds))
    with jax.set_mesh(parts.mesh):
      sequences, drawn = sampler(opened.params, put_batch(prompts, parts.mesh), key)
      scores = None if score is None else to_host(score(sequences).scores)
    shown = [
      (text if isinstance(text, str) else parts.tokenizer.written(text), number, prompt.cut)
      for (text, number), prompt in zip(rows, encoded, strict=True)
    ]
    found = _completions(parts.tokenizer, shown, prompts, to_host(drawn))
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
  tokenizer: Tokenizer,
  rows: list[tuple[str, int, int]],
  prompts: Prompts,
  drawn: Samples,
) -> list[Completion]:
  found = []
  for row, (text, number, cut) in enumerate(rows):
    mask = drawn.mask[row]
    read = prompts.tokens[row][prompts.mask[row]]
    tokens = drawn.tokens[row][mask].tolist()
    found.append(
      Completion(
        prompt=text,
        sample=number,
        text=tokenizer.decode(tokens),
        tokens=tokens,
        logprobs=drawn.logprobs[row][mask].tolist(),
        finished=bool(drawn.finished[row]),
        prompt_tokens=read.tolist(),
        prompt_tokens_cut=cut,
        prompt_tokens_unknown=int((read == tokenizer.unk_id).sum()),
        score=None,
      )
    )
  return found
