"""From a score a response to a reward a token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import check_float, check_shapes
from rlhf_jax.common.masked import last_true, masked_sum
from rlhf_jax.common.types import Experience

Array = jax.Array

PLACEMENTS = ('last_token', 'after_stop', 'last_position')


class Shaped(NamedTuple):
  """Rewards `[B, R]` float32, and the mask `[B, R]` of positions that have a value."""

  rewards: Array
  value_mask: Array


def shape_rewards(scores: Array, penalties: Array, mask: Array, placement: str) -> Shaped:
  """Adds each response's score to its per-token rewards at a place.

  Args:
    scores: `[B]` float.
    penalties: `[B, R]` float, `-beta k1` of each token and what else is paid token by token; read
      under `mask` only.
    mask: `[B, R]` bool, the response's tokens.
    placement: 'last_token' of the response; 'after_stop', the step after it, with the value mask
      one step longer (Huang et al. 2024); 'last_position', the end of the response block (Ziegler
      et al. 2019, whose responses have a fixed length).
  """
  check_shapes('scores:B penalties:BR mask:BR', scores=scores, penalties=penalties, mask=mask)
  check_float(scores=scores, penalties=penalties)
  positions = jnp.arange(mask.shape[-1])
  last = last_true(mask)
  if placement == 'last_token':
    place, value_mask = last, mask
  elif placement == 'after_stop':
    place = jnp.minimum(last + 1, mask.shape[-1] - 1)
    value_mask = positions <= place[:, None]
  elif placement == 'last_position':
    place = jnp.full_like(last, mask.shape[-1] - 1)
    value_mask = jnp.ones_like(mask)
  else:
    raise ValueError(f'placement {placement!r}: expected one of {PLACEMENTS}.')
  rewards = jnp.where(mask, penalties, 0.0).astype(jnp.float32)
  rewards = rewards + jnp.where(positions == place[:, None], scores[:, None], 0.0)
  return Shaped(rewards, value_mask)


def token_rewards(experience: Experience, penalties: Array, placement: str) -> Shaped:
  """`shape_rewards` of samples: what was paid token by token is paid there, the rest at a place."""
  mask = experience.sequences.response_mask
  if experience.token_rewards is None:
    return shape_rewards(experience.scores, penalties, mask, placement)
  paid = jnp.where(mask, experience.token_rewards, 0.0)
  left = experience.scores - masked_sum(paid, mask, axis=-1)
  return shape_rewards(left, penalties + paid, mask, placement)
