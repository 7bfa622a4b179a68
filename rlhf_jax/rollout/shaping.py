"""What a response is scored as: where it is cut for scoring, and what not stopping costs."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import check_float
from rlhf_jax.common.types import Sequences
from rlhf_jax.rollout.config import RolloutConfig

Array = jax.Array


class Stopped(NamedTuple):
  """Responses as they are scored: `sequences` possibly cut, and `[B]` bool whether each stopped."""

  sequences: Sequences
  stopped: Array


def truncate_for_scoring(sequences: Sequences, finished: Array, config: RolloutConfig) -> Stopped:
  """Cuts responses after the first truncation token at or after the given position, if asked to.

  The cut holds for scoring alone (Ziegler et al. 2019, released code): the policy trains on what it
  sampled. A response that holds no such token keeps its length and counts as never stopped.
  """
  if config.score_truncation_token < 0:
    return Stopped(sequences, finished)
  positions = jnp.arange(sequences.response.shape[-1])
  hit = (
    (sequences.response == config.score_truncation_token)
    & sequences.response_mask
    & (positions >= config.score_truncation_after)
  )
  first = jnp.argmax(hit, axis=-1)
  found = hit.any(-1)
  kept = ~found[:, None] | (positions <= first[:, None])
  return Stopped(
    dataclasses.replace(sequences, response_mask=sequences.response_mask & kept), found
  )


def handle_missing_stop(scores: Array, stopped: Array, config: RolloutConfig) -> Array:
  """Scores `[B]` float32 with the named treatment of responses that never stopped.

  Raises `ShapeError` for integer scores, which were truncated somewhere before.
  """
  check_float(scores=scores)
  scores = scores.astype(jnp.float32)
  if config.missing_stop == 'replace':
    return jnp.where(stopped, scores, config.missing_stop_value)
  if config.missing_stop == 'subtract':
    return jnp.where(stopped, scores, scores - config.missing_stop_value)
  return scores
