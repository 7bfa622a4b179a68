"""Random streams depend on the seed, the purpose and the step, and on nothing else."""

import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.common import prng
from rlhf_jax.common.prng import Stream


def bits(key: jax.Array) -> tuple[int, ...]:
  """A key's words."""
  return tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())


def test_no_two_streams_share_a_key() -> None:
  """Every (seed, purpose, step) has a key of its own, different from the base keys too."""
  keys = [
    bits(prng.stream_key(prng.base_key(seed), stream, step))
    for seed, stream, step in itertools.product(range(2), Stream, range(3))
  ]
  keys += [bits(prng.base_key(seed)) for seed in range(2)]
  assert len(set(keys)) == len(keys)


def test_a_stream_is_named_by_its_text() -> None:
  """The key is fold_in(fold_in(base, crc32(name)), step): no process's hash seed is in it."""
  base = jax.random.key(7)
  expected = jax.random.fold_in(jax.random.fold_in(base, zlib.crc32(b'sampling')), 3)
  assert bits(prng.stream_key(prng.base_key(7), Stream.SAMPLING, 3)) == bits(expected)


def test_a_traced_step_gives_the_same_key() -> None:
  """Inside jit, where the step is an array, the numbers are those outside."""
  base = prng.base_key(0)
  traced = jax.jit(lambda step: prng.stream_key(base, Stream.MINIBATCHES, step))(jnp.int32(5))
  assert bits(traced) == bits(prng.stream_key(base, Stream.MINIBATCHES, 5))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
  """A row's key is a function of its number alone, in any batch and at any place."""
  key = prng.base_key(1)
  alone = jax.random.key_data(prng.row_keys(key, jnp.array([11])))[0]
  together = jax.random.key_data(prng.row_keys(key, jnp.array([3, 4, 11, 3])))
  np.testing.assert_array_equal(together[2], alone)
  np.testing.assert_array_equal(together[0], together[3])
  assert not np.array_equal(together[0], together[1])
