"""The library's answers to what torch was asked, and how far the two are apart."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import decoder
from rlhf_jax.models.cache import init_cache
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf_export import decoder_entries
from rlhf_jax.models.hf_load import Checkpoint

Array = jax.Array
# Columns that a step of cached decoding reads.
STEP = 2


class Answers(NamedTuple):
  """Logits `[2, B, T, V]` read at once and step by step, the loss, and gradients by their names."""

  logits: np.ndarray
  decoded: np.ndarray
  loss: float
  gradients: dict[str, np.ndarray]


def answers(checkpoint: Checkpoint, params: Any, asked: Mapping[str, np.ndarray]) -> Answers:
  """What `tests.golden.hf.reference.answers` computes, by the decoder."""
  model = checkpoint.model
  tokens, mask = jnp.asarray(asked['tokens']), jnp.asarray(asked['mask'])

  def loss(params: Any, tokens: Array, mask: Array) -> tuple[Array, Array]:
    columns = tokens.shape[-1]
    scores = logits(model, params, tokens.reshape(-1, columns), mask.reshape(-1, columns))
    scores = scores.reshape(*tokens.shape, -1)
    logprobs = jax.nn.log_softmax(scores[:, :, :-1])
    taken = jnp.take_along_axis(logprobs, tokens[:, :, 1:, None], axis=-1)[..., 0]
    counted = mask[:, :, :-1] & mask[:, :, 1:]
    losses = -(taken * counted).sum((1, 2)) / counted.sum((1, 2))
    return losses.mean(), scores

  (value, scores), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, tokens, mask)
  entries = decoder_entries(checkpoint.family, model, gradients, 'float32', 'gradients')
  return Answers(
    np.asarray(scores),
    decode(model, params, tokens, mask),
    float(value),
    # In memory a tensor may have another name than in files.
    {checkpoint.family.aliases.get(e.name, e.name): e.read() for e in entries},
  )


def logits(model: ModelConfig, params: Any, tokens: Array, mask: Array) -> Array:
  """`[B, T, V]` for `[B, T]`."""
  hidden, _ = decoder.hidden_states(model, params, tokens, mask)
  return decoder.logits(model, params, hidden)


def decode(model: ModelConfig, params: Any, tokens: Array, mask: Array) -> np.ndarray:
  """The logits of both batches, read a few columns at a time with a cache."""

  @jax.jit
  def step(params: Any, tokens: Array, mask: Array, cache: Any) -> Any:
    hidden, cache = decoder.hidden_states(model, params, tokens, mask, cache=cache)
    return decoder.logits(model, params, hidden), cache

  columns = tokens.shape[-1]
  tokens, mask = tokens.reshape(-1, columns), mask.reshape(-1, columns)
  cache, parts = init_cache(model, len(tokens), columns), []
  for start in range(0, columns, STEP):
    now = slice(start, start + STEP)
    scores, cache = step(params, tokens[:, now], mask[:, now], cache)
    parts.append(scores)
  return np.asarray(jnp.concatenate(parts, axis=1)).reshape(2, -1, columns, model.vocab_size)


def errors(found: Answers, expected: Mapping[str, np.ndarray]) -> dict[str, float]:
  """The largest absolute differences: of logits at real tokens, of the loss, of gradients.

  A gradient's is relative to the largest number of its tensor, or to 0.1 if that is larger.
  """
  mask = expected['mask']

  def of_logits(scores: np.ndarray) -> float:
    return float(np.abs(scores - expected['logits'])[mask].max())

  def of_gradient(name: str) -> float:
    theirs = expected[f'gradient/{name}']
    return float(np.abs(found.gradients[name] - theirs).max() / max(np.abs(theirs).max(), 0.1))

  return {
    'logits, left': float(np.abs(found.logits - expected['logits'])[0][mask[0]].max()),
    'logits, right': float(np.abs(found.logits - expected['logits'])[1][mask[1]].max()),
    'cached': of_logits(found.decoded),
    'loss': abs(found.loss - float(expected['loss'])),
    'gradients': max(map(of_gradient, found.gradients)),
  }
