"""Meshes from sizes, and what is laid on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.types import Prompts
from rlhf_jax.sharding.mesh import (
  AXES,
  MeshConfig,
  Share,
  batch_sharding,
  constrain,
  constrain_batch,
  make_mesh,
  put_batch,
  replicated,
  share_of,
)


@pytest.mark.parametrize(
  ('sizes', 'expected'),
  [
    (dict(), (8, 1, 1)),
    (dict(fsdp=2, tensor=2), (2, 2, 2)),
    (dict(data=1, fsdp=-1, tensor=2), (1, 4, 2)),
    (dict(data=2, fsdp=1, tensor=-1), (2, 1, 4)),
    (dict(data=8), (8, 1, 1)),
  ],
)
def test_an_open_size_takes_the_devices_that_are_left(
  sizes: dict[str, int], expected: tuple[int, ...]
) -> None:
  """-1 on any one axis; every device is used once."""
  mesh = make_mesh(MeshConfig(**sizes))
  assert tuple(mesh.shape[name] for name in AXES) == expected
  assert sorted(device.id for device in mesh.devices.flat) == list(range(8))


def test_a_mesh_of_some_devices() -> None:
  """Given devices, only those."""
  mesh = make_mesh(MeshConfig(), jax.devices()[3:4])
  assert mesh.devices.tolist() == [[[jax.devices()[3]]]]


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    (dict(fsdp=3), r'mesh\.data=-1: expected the other sizes, 3 together, to divide the number'),
    (dict(data=2, fsdp=2), r'mesh\.data=2: expected a mesh of 8 devices, got 2 x 2 x 1.*data=-1'),
    (dict(data=16), r'mesh\.data=16: expected a mesh of 8 devices'),
    (dict(fsdp=-1), r'mesh\.fsdp=-1: expected a positive number: mesh\.data is -1 already'),
    (dict(tensor=0), r'mesh\.tensor=0: expected a positive number, or -1'),
    (dict(data=-2), r'mesh\.data=-2: expected a positive number, or -1'),
  ],
)
def test_sizes_that_do_not_fill_the_devices_are_refused(
  sizes: dict[str, int], message: str
) -> None:
  """The error names the axis, the number of devices, and what to do."""
  with pytest.raises(ConfigError, match=message):
    make_mesh(MeshConfig(**sizes))


def test_a_batch_is_split_over_data_and_fsdp() -> None:
  """Each row lies on the devices of its data and fsdp coordinates, whole arrays everywhere."""
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  rows = np.arange(8 * 3, dtype=np.int32).reshape(8, 3)
  batch = put_batch(Prompts(tokens=rows, mask=rows > 3, index=np.arange(8)), mesh)
  for leaf in jax.tree.leaves(batch):
    assert leaf.sharding == batch_sharding(mesh)
    assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {2}
  np.testing.assert_array_equal(batch.tokens, rows)
  assert jax.device_put(rows, replicated(mesh)).sharding.is_fully_replicated


def test_rows_that_do_not_divide_are_put_whole() -> None:
  """One prompt on eight devices is answered on all of them."""
  mesh = make_mesh(MeshConfig())
  batch = put_batch({'tokens': np.ones((3, 5), np.int32), 'index': np.arange(3)}, mesh)
  assert all(leaf.sharding == replicated(mesh) for leaf in jax.tree.leaves(batch))


def test_without_a_mesh_nothing_is_constrained() -> None:
  """The same object comes back, inside and outside of jit."""
  x = jnp.ones((4, 2))
  assert constrain_batch(x) is x
  assert 'sharding_constraint' not in str(jax.make_jaxpr(constrain_batch)(x))


def test_constraints_place_what_divides_and_leave_the_rest() -> None:
  """8 rows are split in 4, 6 rows are left to the compiler, as is an axis that is not named."""
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  with jax.set_mesh(mesh):
    split = jax.jit(lambda x: constrain_batch(x * 1))(jnp.ones((8, 3)))
    assert split.sharding.spec == PartitionSpec(('data', 'fsdp'))
    assert 'sharding_constraint' not in str(jax.make_jaxpr(constrain_batch)(jnp.ones((6, 3))))
    both = jax.jit(lambda x: constrain(x * 1, None, ('data', 'fsdp'), 'tensor'))
    assert both(jnp.ones((3, 4, 2))).sharding.spec == PartitionSpec(
      None, ('data', 'fsdp'), 'tensor'
    )
    odd_heads = both(jnp.ones((3, 4, 5))).sharding.spec
    assert odd_heads == PartitionSpec(None, ('data', 'fsdp'))


def test_none_alone_asks_for_whole_copies() -> None:
  """An array that is cut comes out whole on every device."""
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  cut = jax.device_put(jnp.ones((6, 8)), NamedSharding(mesh, PartitionSpec(None, 'fsdp')))
  with jax.set_mesh(mesh):
    whole = jax.jit(lambda x: constrain(x * 1, None, None))(cut)
  assert whole.sharding.is_fully_replicated and not cut.sharding.is_fully_replicated
  assert constrain(cut, None, None) is cut, 'without a mesh'


def test_constraints_inside_a_mapped_kernel_do_nothing() -> None:
  """Within shard_map the axes are manual already; code with constraints runs there too."""
  mesh = make_mesh(MeshConfig())
  spec = PartitionSpec('data')
  mapped = jax.shard_map(lambda x: constrain_batch(x) * 2, mesh=mesh, in_specs=spec, out_specs=spec)
  np.testing.assert_array_equal(jax.jit(mapped)(jnp.arange(16.0)), 2 * jnp.arange(16.0))


def test_a_process_alone_makes_all_rows() -> None:
  """Whether the mesh divides them or not."""
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  for rows in (3, 8):
    share = share_of(rows, mesh)
    assert share.rows == rows and share.places.tolist() == list(range(rows))


def test_a_share_of_rows_lands_at_its_places(monkeypatch: pytest.MonkeyPatch) -> None:
  """As a process of several puts it: rows are found by their numbers, not by their order here."""
  mesh = make_mesh(MeshConfig(data=4, tensor=2))
  rows = np.arange(8 * 3).reshape(8, 3)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  whole = put_batch({'x': rows}, mesh)['x']
  part = put_batch({'x': rows}, mesh, Share(8, np.arange(8, dtype=np.int32)))['x']
  np.testing.assert_array_equal(whole, rows)
  np.testing.assert_array_equal(part, rows)
  assert whole.sharding == part.sharding == batch_sharding(mesh)
