"""From a score per response to a reward per token."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import check_float, check_shapes
from rlhf_jax.common.masked import last_true, whiten
from rlhf_jax.common.types import Sequences
from rlhf_jax.objectives.ppo import PPOConfig

Array = jax.Array


class Stopped(NamedTuple):
  """Responses as they are scored: `sequences` possibly cut, and `[B]` bool whether each stopped."""

  sequences: Sequences
  stopped: Array


def truncate_for_scoring(sequences: Sequences, finished: Array, config: PPOConfig) -> Stopped:
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


def handle_missing_stop(scores: Array, stopped: Array, config: PPOConfig) -> Array:
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


class Shaped(NamedTuple):
  """Rewards `[B, R]` float32, and the mask `[B, R]` of positions that have a value."""

  rewards: Array
  value_mask: Array


def shape_rewards(scores: Array, penalties: Array, mask: Array, config: PPOConfig) -> Shaped:
  """Adds each response's score to its per-token penalties at the configured place.

  Args:
    scores: `[B]` float.
    penalties: `[B, R]` float, `-beta k1` of each token; read under `mask` only.
    mask: `[B, R]` bool, the response's tokens.
    config: `score_placement` and `whiten_rewards` are read.
  """
  check_shapes('scores:B penalties:BR mask:BR', scores=scores, penalties=penalties, mask=mask)
  check_float(scores=scores, penalties=penalties)
  positions = jnp.arange(mask.shape[-1])
  last = last_true(mask)
  if config.score_placement == 'last_token':
    place, value_mask = last, mask
  elif config.score_placement == 'after_stop':
    place = jnp.minimum(last + 1, mask.shape[-1] - 1)
    value_mask = positions <= place[:, None]
  else:
    place = jnp.full_like(last, mask.shape[-1] - 1)
    value_mask = jnp.ones_like(mask)
  rewards = jnp.where(mask, penalties, 0.0).astype(jnp.float32)
  rewards = rewards + jnp.where(positions == place[:, None], scores[:, None], 0.0)
  if config.whiten_rewards:
    rewards = whiten(rewards, value_mask, keep_mean=True)
  return Shaped(rewards, value_mask)
