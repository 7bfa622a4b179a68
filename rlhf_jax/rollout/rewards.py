"""Several rewards, or several judges of one, made into a single score."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import check_float
from rlhf_jax.rollout.config import RewardConfig

Array = jax.Array

AGGREGATES = ('mean', 'worst', 'uncertainty')


def counted(scores: Sequence[Array], configs: Sequence[RewardConfig]) -> list[Array]:
  """Which of the `[B]` float rewards count, `[B]` bool each.

  Below its `gate_below` a reward counts alone, of several such the first one listed. Elsewhere all
  do but those that are `gate_only`.
  """
  counts = []
  free = jnp.ones(scores[0].shape, bool)
  for score, config in zip(scores, configs, strict=True):
    below = free & (score < (-jnp.inf if config.gate_below is None else config.gate_below))
    counts.append(below)
    free &= ~below
  return [
    alone if config.gate_only else alone | free
    for alone, config in zip(counts, configs, strict=True)
  ]


def combine(scores: Sequence[Array], configs: Sequence[RewardConfig]) -> Array:
  """The weighted sum of those `[B]` float rewards that are `counted`: `[B]` float32.

  Every reward counts up to its `clip_above`, which is not below its gate.
  """
  check_float(**{f'reward_{number}': score for number, score in enumerate(scores)})
  scores = [score.astype(jnp.float32) for score in scores]
  clipped = [
    score if config.clip_above is None else jnp.minimum(score, config.clip_above)
    for score, config in zip(scores, configs, strict=True)
  ]
  total = sum(
    jnp.where(counts, config.weight * score, 0.0)
    for counts, score, config in zip(counted(scores, configs), clipped, configs, strict=True)
  )
  assert isinstance(total, jax.Array)
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
