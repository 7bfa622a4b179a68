"""What is read from compiled programs, against programs whose collectives are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.planning import hlo
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh

MESH = {'data': 1, 'fsdp': 4, 'tensor': 2}
LAYERS, ROWS, WIDTH = 3, 16, 32


def test_a_gather_in_a_loop_counts_as_often_as_the_loop_runs() -> None:
  """Weights cut over fsdp are gathered layer by layer: 3 times 3/4 of a layer's matrix."""
  mesh = make_mesh(MeshConfig(**MESH))

  def put(*spec: str | None) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*spec))

  def run(x: jax.Array, weights: jax.Array) -> jax.Array:
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
      w = jax.lax.with_sharding_constraint(w, put(None, None))
      return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), put('fsdp', None)), None

    return jax.lax.scan(layer, x, weights)[0]

  x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=put('fsdp', None))
  shape = (LAYERS, WIDTH, WIDTH)
  weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=put(None, 'fsdp', None))
  text = str(jax.jit(run).lower(x, weights).compile().as_text())
  program = hlo.read(text, MESH)
  (gather,) = program.collectives
  assert (gather.kind, gather.axes, gather.times) == ('all-gather', 'fsdp', LAYERS)
  assert gather.total == LAYERS * WIDTH * WIDTH * 4 * 3 / 4
  assert program.unknown_loops == 0
  shapes = [array.text for array in program.arrays]
  assert f'f32[{WIDTH},{WIDTH}]' in shapes  # the gathered matrix
  assert max(array.bytes for array in program.arrays) == program.arrays[0].bytes


TEXT = """HloModule test

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

%inside (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %big = f32[4096]{{0}} broadcast(%x)
}}

%body (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %all = f32[8]{{0}} {operation}, {groups}, to_apply=%add, metadata={{op_name="here"}}
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  %fused = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%inside
  ROOT %loop = f32[8]{{0}} while(%fused), condition=%c, body=%body{trips}
}}
"""
ALL_REDUCE = 'all-reduce(%x)'


@pytest.mark.parametrize(
  ('groups', 'axes'),
  [
    ('replica_groups={{0,1},{2,3},{4,5},{6,7}}', 'tensor'),
    ('replica_groups={{0,2,4,6},{1,3,5,7}}', 'fsdp'),
    ('replica_groups=[4,2]<=[8]', 'tensor'),
    ('replica_groups=[2,4]<=[4,2]T(1,0)', 'fsdp'),
    ('replica_groups=[1,8]<=[8]', 'fsdp+tensor'),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", 'fsdp'),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 'fsdp+tensor'),
    ("replica_groups=mesh['axis_0'=8] {'axis_0':(4)2}", 'tensor'),
  ],
)
def test_groups_of_devices_in_every_notation(groups: str, axes: str) -> None:
  """The mesh axes that a collective runs over, and a ring's bytes: 2 (n - 1) / n of the array."""
  text = TEXT.format(operation=ALL_REDUCE, groups=groups, trips='')
  (found,) = hlo.read(text, MESH).collectives
  size = {'tensor': 2, 'fsdp': 4, 'fsdp+tensor': 8}[axes]
  assert (found.axes, found.bytes) == (axes, 2 * 32 * (size - 1) / size)
  assert found.origin == 'here'


@pytest.mark.parametrize(
  ('operation', 'sent'),
  [
    ('all-gather(%x)', 24.0),
    ('reduce-scatter(%x)', 96.0),
    ('all-to-all(%x)', 24.0),
    ('all-reduce-start(%x)', 48.0),
  ],
)
def test_bytes_of_each_kind_among_four(operation: str, sent: float) -> None:
  """Of 32 bytes that come out: gathered 3/4; scattered 3 such parts; an all-reduce is both."""
  text = TEXT.format(operation=operation, groups='replica_groups=[2,4]<=[4,2]T(1,0)', trips='')
  (found,) = hlo.read(text, MESH).collectives
  assert found.bytes == sent


def test_loops_of_known_and_unknown_length() -> None:
  """What the compiler knows counts, else what the caller says; fused arrays are not made."""
  known = ', backend_config={"known_trip_count":{"n":"7"}}'
  for trips, times, unknown in ((known, 7, 0), ('', 5, 1)):
    text = TEXT.format(operation=ALL_REDUCE, groups='replica_groups=[4,2]<=[8]', trips=trips)
    program = hlo.read(text, MESH, unknown_trips=5)
    assert program.collectives[0].times == times and program.unknown_loops == unknown
    assert {array.bytes for array in program.arrays} == {32}
