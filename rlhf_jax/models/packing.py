"""Several texts read in one row, each seeing itself alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.common.types import Packing
from rlhf_jax.models import decoder
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.sharding.mesh import constrain_batch

Array = jax.Array
Params = dict[str, Any]


def packed_states(
  config: ModelConfig,
  params: Params,
  tokens: Array,
  mask: Array,
  packing: Packing,
  first: int,
) -> Array:
  """What `decoder.hidden_states` gives, of rows that are read as they are packed.

  Args:
    config: the architecture.
    params: its decoder parameters.
    tokens: `[B, T]` int32; B is a multiple of `packing.records`.
    mask: `[B, T]` bool, the real tokens of each row, which stand together.
    packing: where they are read.
    first: the first column that is asked for.

  Returns:
    `[B, T - first, width]`; what stands at padding means nothing.
  """

  def blocks(x: Array) -> Array:
    return constrain_batch(x.reshape(-1, packing.records, *x.shape[1:]))

  lay = functools.partial(lay_out, rows=packing.rows, width=packing.width)
  packed, owner = jax.vmap(lay)(*map(blocks, (tokens, mask, packing.row, packing.start)))
  packed, owner = (constrain_batch(x.reshape(-1, packing.width)) for x in (packed, owner))
  hidden, _ = decoder.hidden_states(config, params, packed, owner > 0, segments=owner)
  place = packing.start[:, None] + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - mask
  place = packing.row[:, None] * packing.width + place
  place = jnp.where(mask, place, 0)[:, first:]
  hidden = hidden.reshape(-1, packing.rows * packing.width, hidden.shape[-1])
  taken = jax.vmap(lambda states, places: states[places])(hidden, blocks(place))
  return constrain_batch(taken.reshape(*place.shape, hidden.shape[-1]))


def lay_out(
  tokens: Array, mask: Array, row: Array, start: Array, *, rows: int, width: int
) -> tuple[Array, Array]:
  """One block of texts in the rows that it is packed into.

  Args:
    tokens: `[N, T]` int32.
    mask: `[N, T]` bool, the real ones, which stand together.
    row: `[N]` int32.
    start: `[N]` int32.
    rows: how many there are.
    width: of each.

  Returns:
    `[rows, width]` tokens, and int32 whose they are: the text's number from 1, or 0 for nobody's.
  """
  count, length = tokens.shape
  # The text that begins last, at or before a column: beginnings grow along a row.
  begun = jnp.zeros((rows, width), jnp.int32)
  begun = begun.at[row, start].set(start * count + jnp.arange(count) + 1, unique_indices=True)
  begun = jax.lax.cummax(begun, axis=1)
  text = jnp.maximum(begun - 1, 0) % count
  place = jnp.arange(width) - start[text]
  owner = jnp.where((begun > 0) & (place < mask.sum(1)[text]), text + 1, 0)
  column = jnp.clip(jnp.argmax(mask, axis=1)[text] + place, 0, length - 1)
  return jnp.where(owner > 0, tokens[text, column], 0), owner
