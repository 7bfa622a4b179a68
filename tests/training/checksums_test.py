"""Checksums tell every change, and nothing of where an array lies."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.training import checksums as checksums_lib
from rlhf_jax.training.checksums import checksums

DTYPES = ('float32', 'bfloat16', 'float16', 'int32', 'uint32', 'uint8', 'bool')


def some(dtype: str, shape: tuple[int, ...]) -> jax.Array:
  return jax.random.randint(jax.random.key(1), shape, 0, 100).astype(dtype)


def by_hand(array: np.ndarray, seed: int) -> int:
  """The sum as the docstring has it, one element at a time in Python's whole numbers."""

  def mix(x: int) -> int:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
      x = ((x ^ (x >> shift)) * factor) % 2**32
    return x ^ (x >> 16)

  total = 0
  for index in np.ndindex(array.shape):
    place = seed
    for number in index:
      place = mix(place ^ number)
    total += mix(int(array[index].view(np.uint32)) ^ place)
  return total % 2**32


def test_the_sum_is_that_of_its_definition() -> None:
  array = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
  expected = ''.join(f'{by_hand(array, seed):08x}' for seed in (0x9E3779B9, 0x85EBCA6B))
  assert checksums({'a': jnp.asarray(array)}) == {'a': f'float32[3, 2, 5]:{expected}'}


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', [(), (1,), (7,), (8, 6)])
def test_host_and_devices_agree(
  dtype: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
  leaf = some(dtype, shape)
  on_host = checksums({'x': leaf})
  monkeypatch.setattr(checksums_lib, '_SMALL', -1)
  assert checksums({'x': leaf}) == on_host


def test_the_mesh_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(checksums_lib, '_SMALL', 0)
  leaf = some('float32', (8, 6))
  mesh = jax.make_mesh((4, 2), ('fsdp', 'tensor'))
  for spec in (PartitionSpec(), PartitionSpec('fsdp'), PartitionSpec('fsdp', 'tensor')):
    spread = jax.device_put(leaf, NamedSharding(mesh, spec))
    assert checksums({'x': spread}) == checksums({'x': leaf})


@pytest.mark.parametrize('dtype', DTYPES)
def test_every_single_change_shows(dtype: str) -> None:
  leaf = np.array(some(dtype, (4, 3)))
  before = checksums({'x': jnp.asarray(leaf)})
  for index in np.ndindex(leaf.shape):
    changed = leaf.copy()
    changed[index] = not changed[index] if dtype == 'bool' else changed[index] + 1
    assert checksums({'x': jnp.asarray(changed)}) != before


def changed_shape(leaf: jax.Array) -> Any:
  return leaf.reshape(3, 4)


@pytest.mark.parametrize(
  'change',
  [
    changed_shape,
    lambda leaf: leaf[::-1],  # the same elements, elsewhere
    lambda leaf: leaf.at[0].set(leaf[1]).at[1].set(leaf[0]),
    lambda leaf: leaf.at[2:].set(0),  # a part that was not read
    lambda leaf: -leaf,
    lambda leaf: leaf.view(jnp.int32),  # the same bits, of another meaning
  ],
)
def test_what_storage_may_do_to_an_array_shows(change: Any) -> None:
  leaf = jax.random.normal(jax.random.key(0), (4, 3))
  assert checksums({'x': change(leaf)}) != checksums({'x': leaf})


def test_the_sign_of_zero_and_the_bits_of_nan_count() -> None:
  zeros = jnp.zeros(3)
  assert checksums({'x': -zeros}) != checksums({'x': zeros})
  nans = jnp.full(3, jnp.nan)
  assert checksums({'x': nans}) == checksums({'x': nans + 1}) != checksums({'x': zeros})


def test_names_are_those_of_flat_trees() -> None:
  found = checksums({'b': {'c': jnp.zeros(1)}, 'a': [jnp.zeros((2, 2), jnp.int32)]})
  assert list(found) == ['a.0', 'b.c']
  assert found['a.0'].startswith('int32[2, 2]:')
