"""Several rewards, or several judges of one, made into a single score."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import check_float
from rlhf_jax.rollout.config import RewardConfig

Array = jax.Array

AGGREGATES = ('mean', 'worst', 'uncertainty')


def combine(scores: Sequence[Array], configs: Sequence[RewardConfig]) -> Array:
  """The weighted sum of `[B]` float rewards, less what thresholds and gates take away: `[B]`.

  Every reward counts up to its `clip_above`, those that are `gate_only` not at all. A reward below
  its `gate_below` alone is the score, weighted; of several such the first one listed.
  """
  check_float(**{f'reward_{number}': score for number, score in enumerate(scores)})
  scores = [score.astype(jnp.float32) for score in scores]
  clipped = [
    score if config.clip_above is None else jnp.minimum(score, config.clip_above)
    for score, config in zip(scores, configs, strict=True)
  ]
  total = sum(
    config.weight * score
    for score, config in zip(clipped, configs, strict=True)
    if not config.gate_only
  )
  assert isinstance(total, jax.Array)
  for score, config in reversed(list(zip(scores, configs, strict=True))):
    if config.gate_below is not None:
      total = jnp.where(score < config.gate_below, config.weight * score, total)
  return total


def aggregate(scores: Array, kind: str, coefficient: float) -> Array:
  """One score from an ensemble's, `[K, ...] -> [...]` (Coste et al. 2023, section 4.2).

  mean          mu
  worst         min over members
  uncertainty   mu - coefficient variance (biased)
  """
  check_float(scores=scores)
  if kind == 'worst':
    return scores.min(0)
  mean = scores.mean(0)
  if kind == 'mean':
    return mean
  if kind == 'uncertainty':
    return mean - coefficient * jnp.square(scores - mean).mean(0)
  raise ValueError(f'kind {kind!r}: expected one of {AGGREGATES}.')
