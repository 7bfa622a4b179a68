"""One key tree: a base key from the run's seed, a named stream a purpose, folded with the step."""

import enum
import zlib

import jax

from rlhf_jax.common.errors import ConfigError

Array = jax.Array


class Stream(enum.Enum):
  """The purposes for which random numbers are drawn. A purpose never shares another's numbers."""

  INIT = 'init'
  SAMPLING = 'sampling'
  MINIBATCHES = 'minibatches'
  DROPOUT = 'dropout'
  EVALUATION = 'evaluation'
  NORMALIZATION = 'normalization'


def base_key(seed: int) -> Array:
  """The key of a run; all its other keys descend from it."""
  return jax.random.key(seed)


def stream_key(key: Array, stream: Stream, step: int | Array = 0) -> Array:
  """The key of one stream at one step: a function of (base key, name, step), of nothing else."""
  name = zlib.crc32(stream.value.encode())
  return jax.random.fold_in(jax.random.fold_in(key, name), step)


def row_keys(key: Array, index: Array) -> Array:
  """`[B]` row numbers -> `[B]` keys, so that a row's draws do not depend on its neighbours."""
  return jax.vmap(lambda row: jax.random.fold_in(key, row))(index)


def check_seed(field: str, seed: int) -> None:
  """Raises ConfigError for a seed that another one would be taken for: keys have 32 bits of it."""
  if not 0 <= seed < 2**32:
    raise ConfigError(field, seed, 'an integer from 0 to 2**32 - 1')
