"""The key-value cache of incremental decoding: an explicit pytree, passed in and handed back."""

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.sharding.mesh import BATCH_AXES, constrain

Array = jax.Array


@struct.dataclass
class Cache:
  """Keys and values of the tokens seen so far, `S` columns of room.

  Attention goes by `column_positions` alone, so that single tokens may be written round and round:
  whoever reads them one by one may set `index` back to 0 once the columns there are free.

  Attributes:
    keys: `[B, KV, S, K]` for each layer, as a tuple of arrays where layers are unrolled (so that a
      step writes each in place) and as one `[L, B, KV, S, K]` array where they are scanned.
    values: likewise.
    column_positions: `[B, S]` int32, the position of the real token that a column holds, or -1.
    positions: `[B]` int32, the position of each row's next token.
    index: int32 scalar, the next column to be written.
  """

  keys: tuple[Array, ...] | Array
  values: tuple[Array, ...] | Array
  column_positions: Array
  positions: Array
  index: Array

  @property
  def length(self) -> int:
    """How many columns there are."""
    return self.column_positions.shape[1]


def init_cache(config: ModelConfig, batch: int, length: int) -> Cache:
  """An empty cache with room for `length` columns, in the compute type."""
  shape = (batch, config.num_kv_heads, length, config.size_per_head)

  def empty() -> tuple[Array, ...] | Array:
    zeros = jnp.zeros(shape, config.compute_dtype)
    if config.scanned:
      stacked = jnp.zeros((config.layers, *shape), config.compute_dtype)
      return constrain(stacked, None, BATCH_AXES, 'tensor')
    return tuple(constrain(zeros, BATCH_AXES, 'tensor') for _ in range(config.layers))

  return Cache(
    keys=empty(),
    values=empty(),
    column_positions=jnp.full((batch, length), -1, jnp.int32),
    positions=jnp.zeros(batch, jnp.int32),
    index=jnp.zeros((), jnp.int32),
  )
