"""Checksums of arrays that do not depend on how they are spread over devices and processes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.common import trees
from rlhf_jax.common.processes import to_host

# Arrays up to this size are summed on the host: for them, a program would be longer compiled than
# it saves.
_SMALL = 2**16
_UINTS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
# Two sums of 32 bits, with different numbers for the places.
_SEEDS = (0x9E3779B9, 0x85EBCA6B)


def checksums(tree: Any) -> dict[str, str]:
  """By flat name of each leaf: dtype, shape and 64 bits over its values, `'float32[8, 2]:0f..'`.

  Of every element the bits and the place are mixed to a number of 32 bits, and the numbers are
  summed modulo 2^32, twice: whole numbers add up alike in any order, on any mesh. A change of one
  element always shows; other damage goes unseen once in 2^64 times. No protection against intent.

  Large arrays are summed where they lie. Where they span several processes, all must ask.
  """
  return {
    name: f'{leaf.dtype.name}{list(leaf.shape)}:{_sums(leaf)}'
    for name, leaf in trees.flatten(tree).items()
  }


def _sums(leaf: jax.Array) -> str:
  if leaf.size <= _SMALL:
    array = np.asarray(to_host(leaf))
    bits = array.astype(np.uint8) if array.dtype == bool else array
    sums: Any = _both(bits.view(_UINTS[bits.itemsize]).astype(np.uint32), np)
  else:
    sums = to_host(_on_device(leaf))
  return ''.join(f'{int(number):08x}' for number in sums)


@jax.jit
def _on_device(leaf: jax.Array) -> Any:
  bits = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
  bits = jax.lax.bitcast_convert_type(bits, _UINTS[bits.dtype.itemsize])
  return _both(bits.astype(jnp.uint32), jnp)


def _both(bits: Any, xp: Any) -> list[Any]:
  """The two sums of an array's bits, given as uint32, with numpy or jax.numpy."""
  bits = xp.atleast_1d(bits)
  return [_sum(bits, seed, xp) for seed in _SEEDS]


def _sum(bits: Any, seed: int, xp: Any) -> Any:
  place = xp.full([1] * bits.ndim, seed, xp.uint32)
  for axis, size in enumerate(bits.shape):
    numbers = xp.arange(size, dtype=xp.uint32)
    place = _mix(place ^ numbers.reshape([-1 if at == axis else 1 for at in range(bits.ndim)]))
  return xp.sum(_mix(bits ^ place), dtype=xp.uint32)


def _mix(x: Any) -> Any:
  """The last step of MurmurHash3 (Appleby 2011): one-to-one on 32 bits, every bit counts."""
  x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return x ^ (x >> np.uint32(16))
