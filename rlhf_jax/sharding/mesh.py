"""The device mesh (data, fsdp, tensor), and how batches lie on it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.common.errors import ConfigError

Array = jax.Array

AXES = ('data', 'fsdp', 'tensor')
# Rows of a batch are split over these; parameters over 'fsdp' and 'tensor' (rules.py).
BATCH_AXES = ('data', 'fsdp')


@dataclasses.dataclass(kw_only=True)
class MeshConfig:
  """How devices are arranged; at most one size may be -1, which takes the devices that are left."""

  # Copies of the parameters; each works on its own rows.
  data: int = -1
  # Parts into which each copy of parameters and optimizer state is cut (ZeRO-3: Rajbhandari 2020);
  # rows are split over it too.
  fsdp: int = 1
  # Parts into which heads, hidden units and vocabulary are cut (Megatron-LM: Shoeybi et al. 2019).
  tensor: int = 1

  def validate(self, path: str) -> None:
    """Raises ConfigError for sizes that are neither positive nor a single -1."""
    for name in AXES:
      size = getattr(self, name)
      if size != -1 and size < 1:
        raise ConfigError(f'{path}.{name}', size, 'a positive number, or -1 for all that is left')
    open_axes = [name for name in AXES if getattr(self, name) == -1]
    if len(open_axes) > 1:
      raise ConfigError(
        f'{path}.{open_axes[1]}', -1, f'a positive number: {path}.{open_axes[0]} is -1 already'
      )

  def sizes(self, devices: int, path: str = 'mesh') -> tuple[int, int, int]:
    """Sizes of the axes on that many devices; raises ConfigError if they do not fill them."""
    self.validate(path)
    given = [getattr(self, name) for name in AXES]
    fixed = math.prod(size for size in given if size != -1)
    remedy = (
      f'There are {devices} devices; the product of {path}.{{data,fsdp,tensor}} must be that.'
    )
    if -1 in given and devices % fixed:
      name = AXES[given.index(-1)]
      expected = f'the other sizes, {fixed} together, to divide the number of devices'
      raise ConfigError(f'{path}.{name}', -1, expected, remedy)
    data, fsdp, tensor = (devices // fixed if size == -1 else size for size in given)
    if data * fsdp * tensor != devices:
      raise ConfigError(
        f'{path}.data',
        data,
        f'a mesh of {devices} devices, got {data} x {fsdp} x {tensor}',
        f'{remedy} {path}.data=-1 takes the devices that are left.',
      )
    return data, fsdp, tensor


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh over `devices` (None: all there are), with axes that the compiler propagates (Auto).

  Raises ConfigError if the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = config.sizes(len(devices))
  # jax.make_mesh would default to Explicit axes.
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over data and fsdp; every other axis whole."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def row_devices(mesh: Mesh) -> int:
  """Over how many devices the rows of a batch are split."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def replicated(mesh: Mesh) -> NamedSharding:
  """Everything on every device."""
  return NamedSharding(mesh, PartitionSpec())


class Share(NamedTuple):
  """The rows of a batch that one process makes.

  Attributes:
    rows: how many the whole batch has.
    places: `[L]` int32, which of them are here, in rising order.
  """

  rows: int
  places: np.ndarray


def share_of(rows: int, mesh: Mesh) -> Share:
  """The rows of a batch that this process's devices hold: all of them, if there is one process."""
  sharding = _sharding_of_rows(rows, mesh)
  held = np.zeros(rows, bool)
  for index in sharding.addressable_devices_indices_map((rows,)).values():
    held[index] = True
  return Share(rows, np.flatnonzero(held).astype(np.int32))


def put_batch(batch: Any, mesh: Mesh, share: Share | None = None) -> Any:
  """Lays a host batch on the mesh: rows over data and fsdp.

  Rows that the mesh does not divide, like one prompt given by hand, are put whole on every device.

  Args:
    batch: arrays `[L, ...]`.
    mesh: the device mesh.
    share: which rows of the whole batch these are; None: all, the same on every process.
  """

  def put(x: Any) -> Array:
    rows, places = (len(x), np.arange(len(x))) if share is None else share
    sharding = _sharding_of_rows(rows, mesh)
    if jax.process_count() == 1:
      return jax.device_put(x, sharding)

    def part(index: Any) -> Any:
      wanted = np.arange(rows)[index[0]]
      return np.asarray(x)[np.searchsorted(places, wanted)]

    return jax.make_array_from_callback((rows, *np.shape(x)[1:]), sharding, part)

  return jax.tree.map(put, batch)


def _sharding_of_rows(rows: int, mesh: Mesh) -> NamedSharding:
  divides = rows % row_devices(mesh) == 0
  return batch_sharding(mesh) if divides else replicated(mesh)


def constrain(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
  """Asks the compiler to lay the leading axes of `x` over the named mesh axes; None: not cut.

  Without a mesh (`jax.set_mesh`), or in code already mapped over it, this does nothing. An axis
  that the mesh does not divide, like the rows of a short last batch, is left to the compiler.
  """
  mesh = jax.sharding.get_abstract_mesh()
  automatic = {
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind == AxisType.Auto
  }
  spec: list[str | tuple[str, ...] | None] = []
  for size, axis in zip(x.shape, axes, strict=False):
    names = () if axis is None else (axis,) if isinstance(axis, str) else axis
    known = automatic.issuperset(names)
    divides = known and size % math.prod(mesh.shape[name] for name in names) == 0
    spec.append(axis if names and divides else None)
  if not automatic or (spec.count(None) == len(spec) and any(axis is not None for axis in axes)):
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def constrain_batch(x: Array) -> Array:
  """Asks the compiler to split rows over data and fsdp; nothing happens without a mesh."""
  return constrain(x, BATCH_AXES)
