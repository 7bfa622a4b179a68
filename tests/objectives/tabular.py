"""Actors without a network, and batches, on which the properties of objectives are tested.

`TABLES` are actors whose parameters are tables: the log-probs of a token depend on its place and
the token before it. `DIRECT` are actors whose parameters are their outputs, so that a gradient by
the parameters is a gradient by log-probs, values or scores.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.common.types import Pairs, PolicyOutput, Rollouts, Sequences
from rlhf_jax.objectives import Actors, ObjectiveConfig, objective_of
from rlhf_jax.ops.logprobs import entropy, token_logprobs
from tests import quick

VOCAB, P, R, B = 5, 3, 4, 4
LENGTHS = ((4, 2), (1, 3), (3, 4), (2, 1))


def make_sequences(rng: np.random.Generator, shape: tuple[int, ...]) -> Sequences:
  """Random prompts of 1-3 tokens and responses of the lengths above, `shape` (B,) or (B, 2)."""
  lengths = np.array(LENGTHS)[:, 0] if len(shape) == 1 else np.array(LENGTHS)
  prompt_lengths = np.arange(B).reshape((B,) + (1,) * (len(shape) - 1)) % P + 1
  prompt_mask = np.broadcast_to(np.arange(P) >= P - prompt_lengths[..., None], (*shape, P))
  return Sequences(
    prompt=rng.integers(0, VOCAB, (*shape, P)),
    prompt_mask=prompt_mask.copy(),
    response=rng.integers(0, VOCAB, (*shape, R)),
    response_mask=np.arange(R) < lengths[..., None],
  )


def make_batch(data: str, seed: int = 0) -> Any:
  """What an objective eats, as NumPy arrays; the pairs have hard labels, a soft one and a tie."""
  rng = np.random.default_rng(seed)

  def normal(*shape: int) -> np.ndarray:
    return rng.normal(0, 1, shape).astype(np.float32)

  if data == 'demonstrations':
    return make_sequences(rng, (B,))
  if data == 'comparisons':
    return Pairs(
      sequences=make_sequences(rng, (B, 2)),
      preference=np.array([1.0, 0.8, 0.5, 1.0], np.float32),
      margin=np.array([0.5, 0.0, 0.2, 1.5], np.float32),
      reference_logprobs=-1.5 + 0.3 * normal(B, 2, R),
    )
  sequences = make_sequences(rng, (B,))
  last = sequences.response_mask.sum(-1, keepdims=True)
  return Rollouts(
    sequences=sequences,
    old_logprobs=-1.6 + 0.3 * normal(B, R),
    reference_logprobs=-1.6 + 0.3 * normal(B, R),
    old_values=normal(B, R),
    advantages=normal(B, R),
    returns=normal(B, R),
    value_mask=np.arange(R) <= last,  # one step longer, as with scores paid after the stop
  )


def make_tables(seed: int = 1, length: int = R + 4) -> dict[str, jax.Array]:
  """Parameters for `TABLES`, for up to `length` response tokens."""
  rng = np.random.default_rng(seed)
  shapes = {'policy': (length, VOCAB, VOCAB), 'value': (length, VOCAB), 'reward': (VOCAB,)}
  return {name: jnp.asarray(rng.normal(0, 1, shape), jnp.float32) for name, shape in shapes.items()}


def table_policy(params: Any, sequences: Sequences) -> PolicyOutput:
  """Logits and values looked up by place and previous token."""
  before = jnp.concatenate([sequences.prompt[..., -1:], sequences.response[..., :-1]], axis=-1)
  places = jnp.arange(before.shape[-1])
  logits = params['policy'][places, before]
  return PolicyOutput(
    logprobs=token_logprobs(logits, sequences.response),
    entropy=entropy(logits),
    values=params['value'][places, before],
  )


def table_reward(params: Any, sequences: Sequences) -> jax.Array:
  """The sum over real tokens, prompt and response, of what each is worth."""
  worth = params['reward']
  prompt = jnp.where(sequences.prompt_mask, worth[sequences.prompt], 0.0)
  response = jnp.where(sequences.response_mask, worth[sequences.response], 0.0)
  return prompt.sum(-1) + 2 * response.sum(-1)


TABLES = Actors(policy=table_policy, reward=table_reward)


def direct_policy(params: Any, sequences: Sequences) -> PolicyOutput:
  """The parameters as they are, `[..., R]`; the leading axes are brought to the sequences'."""
  shape = sequences.response.shape
  return PolicyOutput(
    **{name: params[name].reshape(shape) for name in ('logprobs', 'entropy', 'values')}
  )


DIRECT = Actors(policy=direct_policy, reward=lambda params, sequences: params['scores'].reshape(-1))


def make_outputs(data: str, seed: int = 2) -> dict[str, np.ndarray]:
  """Parameters for `DIRECT`: `[B, R]` or `[B, 2, R]`, and scores `[B, 2]`, float32."""
  rng = np.random.default_rng(seed)
  shape = (B, 2, R) if data == 'comparisons' else (B, R)
  outputs = {name: rng.normal(0, 1, shape) for name in ('entropy', 'values')}
  outputs['logprobs'] = -1.6 + 0.4 * rng.normal(0, 1, shape)
  outputs['scores'] = rng.normal(0, 1, (B, 2))
  return {name: values.astype(np.float32) for name, values in outputs.items()}


# `(params, batch) -> (loss as Mean, metrics, gradient of the loss's total by params)`
Evaluate = Callable[[Any, Any], tuple[Any, Any, Any]]
_EVALUATORS: dict[tuple[str, Actors], Evaluate] = {}


def evaluator(config: ObjectiveConfig, actors: Actors) -> Evaluate:
  """The jitted loss of a config with its gradient; equal configs share one compiled function."""
  key = (repr(config), actors)
  if key not in _EVALUATORS:
    objective = objective_of(config)

    @quick.jit
    def evaluate(params: Any, batch: Any) -> tuple[Any, Any, Any]:
      def total(params: Any) -> Any:
        mean, metrics = objective.loss(config, actors, params, batch)
        return mean.total, (mean, metrics)

      slopes, (mean, metrics) = jax.grad(total, has_aux=True)(params)
      return mean, metrics, slopes

    _EVALUATORS[key] = evaluate
  return _EVALUATORS[key]


def masks_of(batch: Any) -> dict[str, np.ndarray]:
  """Which outputs of `DIRECT` may matter."""
  sequences = batch if isinstance(batch, Sequences) else batch.sequences
  values = batch.value_mask if isinstance(batch, Rollouts) else sequences.response_mask
  response = sequences.response_mask
  return {'logprobs': response, 'entropy': response, 'values': values}


def garbage(batch: Any, bad: float, token: int) -> Any:
  """The batch with `bad` at every masked number and `token` at every masked token."""

  def fill(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(mask, values, np.float32(bad))

  def fill_tokens(rows: Sequences) -> Sequences:
    return dataclasses.replace(
      rows,
      prompt=np.where(rows.prompt_mask, rows.prompt, token),
      response=np.where(rows.response_mask, rows.response, token),
    )

  if isinstance(batch, Sequences):
    return fill_tokens(batch)
  mask = batch.sequences.response_mask
  changed: dict[str, Any] = {
    'sequences': fill_tokens(batch.sequences),
    'reference_logprobs': fill(batch.reference_logprobs, mask),
  }
  if isinstance(batch, Rollouts):
    changed |= {name: fill(getattr(batch, name), mask) for name in ('old_logprobs', 'advantages')}
    changed |= {
      name: fill(getattr(batch, name), batch.value_mask) for name in ('old_values', 'returns')
    }
  return dataclasses.replace(batch, **changed)


def pad(batch: Any, left: int, right: int) -> Any:
  """The batch with more padding: `left` prompt columns and `right` response columns."""

  def widen(x: Any, before: int, after: int) -> Any:
    # Tokens and numbers are padded with 1, masks with False.
    fill = False if x.dtype == bool else 1
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, after)], constant_values=fill)

  def widen_sequences(rows: Sequences) -> Sequences:
    return Sequences(
      prompt=widen(rows.prompt, left, 0),
      prompt_mask=widen(rows.prompt_mask, left, 0),
      response=widen(rows.response, 0, right),
      response_mask=widen(rows.response_mask, 0, right),
    )

  if isinstance(batch, Sequences):
    return widen_sequences(batch)
  per_token = {
    name: widen(value, 0, right)
    for name, value in vars(batch).items()
    if name not in ('sequences', 'preference', 'margin')
  }
  return dataclasses.replace(batch, sequences=widen_sequences(batch.sequences), **per_token)


def swap(pairs: Pairs) -> Pairs:
  """The same comparisons with first and second exchanged, labels too."""
  exchanged = jax.tree.map(lambda x: x[:, ::-1], (pairs.sequences, pairs.reference_logprobs))
  return dataclasses.replace(
    pairs,
    sequences=exchanged[0],
    reference_logprobs=exchanged[1],
    preference=1 - pairs.preference,
  )
