"""Puts what is read of a checkpoint's tensors onto devices, so that the host holds little of it."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import hf_layout
from rlhf_jax.models.hf_model import Piece

# How many numbers of a table, such as that of the embeddings, are on their way at a time.
_BLOCK = 2**22

Bounds = tuple[tuple[int, int], ...]
Read = Callable[[Bounds], np.ndarray]


def place(
  piece: Piece, tensor: Any, leaf: Any, sizes: hf_layout.Sizes, loaded: dict[str, Any]
) -> None:
  """Reads a piece onto the devices; a layer goes into the stack of all of them.

  Args:
    piece: what is read.
    tensor: what it is read from, to be sliced.
    leaf: the parameter's shape and sharding.
    sizes: of the tensor's axes.
    loaded: the parameters by name, to which it is added.
  """
  layout = hf_layout.parse(piece.tensor.layout)

  def read(bounds: Bounds) -> np.ndarray:
    slices = tuple(slice(start, stop) for start, stop in bounds)
    return hf_layout.read(layout, sizes, piece.tensor.part, slices, lambda part: tensor[part])

  if piece.layer is None:
    lead = layout.ours.index(layout.theirs[0][0])
    loaded[piece.param] = _in_blocks(read, leaf.shape, sharding_of(leaf), lead)
    return
  sharding = sharding_of(leaf)
  array = _whole(read, leaf.shape[1:], _without_layers(sharding))
  if piece.param not in loaded:
    loaded[piece.param] = _zeros(leaf.shape, sharding)
  stack = _insert_layer(sharding)(loaded.pop(piece.param), array, piece.layer)
  # One at a time: what waits to be moved is held by the host.
  loaded[piece.param] = stack.block_until_ready()


def sharding_of(leaf: Any) -> jax.sharding.Sharding:
  """Where a parameter goes: the default device if it does not say."""
  own = getattr(leaf, 'sharding', None)
  return jax.sharding.SingleDeviceSharding(jax.devices()[0]) if own is None else own


def _whole(read: Read, shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> jax.Array:
  """An array whose parts are read at once."""
  read = functools.cache(read)  # devices that hold the same part share what is read
  return jax.make_array_from_callback(shape, sharding, lambda index: read(_bounds(index, shape)))


def _in_blocks(
  read: Read, shape: tuple[int, ...], sharding: jax.sharding.Sharding, axis: int
) -> jax.Array:
  """An array whose parts are read block by block along an axis, into what the devices hold."""
  part = sharding.shard_shape(shape)
  step = max(1, _BLOCK * part[axis] // math.prod(part))
  if part[axis] <= step:
    return _whole(read, shape, sharding)
  owners: dict[Bounds, list[jax.Device]] = {}
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    owners.setdefault(_bounds(index, shape), []).append(device)
  arrays = []
  for bounds, devices in owners.items():
    held = [_zeros(part, jax.sharding.SingleDeviceSharding(device)) for device in devices]
    first, last = bounds[axis]
    for start in range(first, last, step):
      start = min(start, last - step)  # blocks of one size are one program
      values = read((*bounds[:axis], (start, start + step), *bounds[axis + 1 :]))
      held = [
        _insert_block(axis)(array, jax.device_put(values, array.sharding), start - first)
        for array in held
      ]
      jax.block_until_ready(held)
    arrays += held
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _bounds(index: Any, shape: tuple[int, ...]) -> Bounds:
  pairs = (axis.indices(size) for axis, size in zip(index, shape, strict=True))
  return tuple((start, stop) for start, stop, _ in pairs)


def _without_layers(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
  """The sharding of one layer of a stack; layers are not divided over devices."""
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return sharding
  return jax.sharding.NamedSharding(
    sharding.mesh, jax.sharding.PartitionSpec(*tuple(sharding.spec)[1:])
  )


@functools.lru_cache(maxsize=256)
def _make_zeros(shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> Any:
  return jax.jit(lambda: jnp.zeros(shape, jnp.float32), out_shardings=sharding)


def _zeros(shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> jax.Array:
  return _make_zeros(shape, sharding)()


@functools.lru_cache(maxsize=256)
def _insert_layer(sharding: jax.sharding.Sharding) -> Any:
  """Writes a layer into its stack, in place."""

  def insert(stack: jax.Array, layer: jax.Array, number: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, number, 0)

  return jax.jit(insert, donate_argnums=0, out_shardings=sharding)


@functools.lru_cache(maxsize=8)
def _insert_block(axis: int) -> Any:
  """Writes a block into a device's part of an array, in place."""

  def insert(part: jax.Array, block: jax.Array, start: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(part, block, start, axis)

  return jax.jit(insert, donate_argnums=0)
