"""Batches and states are split over microbatches and devices, and nothing else changes."""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.common import trees
from rlhf_jax.config import EvaluationConfig
from rlhf_jax.recipes import Built
from rlhf_jax.sharding.mesh import MeshConfig, batch_sharding, put_batch
from rlhf_jax.training.optimizer import OptimizerConfig
from rlhf_jax.training.state import TrainState
from tests import tiny

pytestmark = pytest.mark.slow

# Mesh (data, fsdp, tensor), whose product is the number of devices, and microbatches.
SPLITS = {
  'accumulation 2': ((1, 1, 1), 2),
  'accumulation 4': ((1, 1, 1), 4),
  'mesh (8, 1, 1)': ((8, 1, 1), 1),
  'mesh (2, 2, 2), accumulation 2': ((2, 2, 2), 2),
  'mesh (1, 4, 2)': ((1, 4, 2), 1),
}
# Every split of the commonest, and of one case of each kind: plain means, pairs, a statistic of the
# batch, whitening, groups. The others, made of the same parts, are cut along all axes and into
# microbatches at once.
THOROUGH = ('sft', 'reward_model', 'dpo', 'cpl', 'kto', 'ppo', 'grpo')
AT_ONCE = 'mesh (2, 2, 2), accumulation 2'
CASES = [(case, split) for split in SPLITS for case in THOROUGH] + [
  (case, AT_ONCE) for case in tiny.OBJECTIVES if case not in THOROUGH
]


def mesh_config(sizes: tuple[int, int, int]) -> MeshConfig:
  return MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])


def build(case: str, start: pathlib.Path, mesh: tuple[int, int, int], accumulation: int) -> Built:
  """A stage whose one update is `params - gradient`."""
  config = tiny.make_config(
    case,
    start,
    steps=1,
    accumulation=accumulation,
    optimizer=OptimizerConfig(name='sgd', learning_rate=1.0, clip_norm=0.0),
    mesh=mesh_config(mesh),
  )
  once = {name: 1 for name in ('epochs', 'minibatches') if hasattr(config.objective, name)}
  config.objective = dataclasses.replace(config.objective, **once)
  return tiny.build_recipe(config, mesh[0] * mesh[1] * mesh[2])


class Step(NamedTuple):
  """A step seen from outside: host arrays and floats."""

  prepared: Any
  params: dict[str, np.ndarray]
  gradients: dict[str, np.ndarray]
  metrics: dict[str, float]


def moved(state: TrainState, seed: int) -> TrainState:
  """The state with other parameters, equal on every mesh: nothing is at its reference any more."""
  rng = np.random.default_rng(seed)

  def move(leaf: jax.Array) -> jax.Array:
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    return jax.device_put(np.asarray(leaf) + 0.05 * noise, leaf.sharding)

  return dataclasses.replace(
    state,
    params=jax.tree.map(move, state.params),
    targets=jax.tree.map(move, state.targets),
  )


def take_step(built: Built, prepared: Any = None) -> Step:
  """One step near the initial state; on a given prepared batch, if there is one."""
  recipe = built.recipe
  with jax.set_mesh(built.mesh):
    state = moved(recipe.init(), 0)
    own = recipe.prepare(state, recipe.batch(0))
    # As the update takes it: the rows of every leaf are cut, of numbers alike in all rows too.
    cut = batch_sharding(built.mesh)
    for leaf in jax.tree.leaves(own.batch):
      assert leaf.sharding.is_equivalent_to(cut, leaf.ndim)
    state = moved(state, 1)
    batch = own.batch if prepared is None else put_batch(prepared, built.mesh)
    host = jax.device_get(own.batch)
    before = jax.device_get(trees.flatten(state.params))
    after, metrics = recipe.update(dataclasses.replace(state, carry=own.carry), batch)
    after = jax.device_get(trees.flatten(after.params))
  gradients = {name: before[name] - after[name] for name in before}
  return Step(host, before, gradients, metrics_lib.values({**own.metrics, **metrics}))


@pytest.fixture(scope='module')
def whole(parents: pathlib.Path) -> Any:
  """`whole(case)`: the step on one device in one piece."""
  done: dict[str, Step] = {}

  def step(case: str) -> Step:
    if case not in done:
      done[case] = take_step(build(case, parents, (1, 1, 1), 1))
    return done[case]

  return step


@pytest.mark.parametrize(('case', 'split'), CASES)
def test_a_split_changes_nothing(case: str, split: str, whole: Any, parents: pathlib.Path) -> None:
  """Loss, metrics and gradients are those of one device and one piece, to float error.

  The batch that is prepared (reference log-probs; a rollout with whitened advantages) is too.
  """
  expected = whole(case)
  mesh, accumulation = SPLITS[split]
  found = take_step(build(case, parents, mesh, accumulation), expected.prepared)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    found.prepared,
    expected.prepared,
  )
  assert found.params.keys() == expected.params.keys()
  for name, gradient in expected.gradients.items():
    np.testing.assert_allclose(found.params[name], expected.params[name], atol=1e-6, err_msg=name)
    scale = max(np.abs(gradient).max(), 1e-3)
    np.testing.assert_allclose(
      found.gradients[name], gradient, rtol=0, atol=2e-6 + 1e-5 * scale, err_msg=name
    )
  assert found.metrics == pytest.approx(expected.metrics, rel=2e-5, abs=1e-5)


def bytes_on_a_device(tree: Any) -> int:
  """What one device holds of a tree."""
  return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(('sizes', 'parts'), [((1, 4, 2), 8), ((2, 2, 2), 4), ((8, 1, 1), 1)])
def test_parameters_and_moments_are_cut_over_fsdp_and_tensor(
  sizes: tuple[int, int, int], parts: int, parents: pathlib.Path
) -> None:
  """Nothing is silently whole on every device, before and after an update; donation frees states.

  Norm weights have no tensor axis, and counters are scalars: all else is cut into `parts`.
  """
  config = tiny.make_config('dpo', parents, mesh=mesh_config(sizes))
  built = tiny.build_recipe(config, 8)
  with jax.set_mesh(built.mesh):
    first = built.recipe.init()
    prepared = built.recipe.prepare(first, built.recipe.batch(0))
    second, _ = built.recipe.update(first, prepared.batch)
  for leaf in jax.tree.leaves((first.params, first.opt_state)):
    assert leaf.is_deleted(), 'a donated buffer is still there'
  abstract = built.recipe.abstract
  assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), second) == jax.tree.map(
    lambda x: (x.shape, x.dtype, x.sharding), abstract
  )
  total = {name: leaf.nbytes for name, leaf in trees.flatten(second.params).items()}
  for name, leaf in trees.flatten(second.params).items():
    if leaf.ndim > (2 if 'layers' in name else 1):  # a matrix, stacked over layers or not
      assert bytes_on_a_device(leaf) * parts == total[name], name
  held = bytes_on_a_device(second.params)
  assert held <= 1.1 * sum(total.values()) / parts
  # Adam's two moments lie as the parameters do, beside two counters of 4 bytes.
  assert bytes_on_a_device(second.opt_state) <= 2 * held + 16
  batch = prepared.batch.sequences.response
  assert bytes_on_a_device(batch) * sizes[0] * sizes[1] == batch.nbytes


@pytest.mark.parametrize('case', ['sft', 'kto', 'ilql', 'reward_process'])
def test_evaluations_do_not_depend_on_the_mesh(case: str, parents: pathlib.Path) -> None:
  """Losses row by row, answers to prompts and their divergence are those of one device."""
  evaluation = EvaluationConfig(prompts=tiny.ROWS, records=tiny.ROWS, batch_size=tiny.ROWS)
  found = []
  for sizes in ((1, 1, 1), (2, 2, 2)):
    config = tiny.make_config(case, parents, evaluation=evaluation, mesh=mesh_config(sizes))
    built = tiny.build_recipe(config, sizes[0] * sizes[1] * sizes[2])
    with jax.set_mesh(built.mesh):
      found.append(built.recipe.evaluate(moved(built.recipe.init(), 0).by_role, 0))
  assert found[0].scalars == pytest.approx(found[1].scalars, rel=1e-4, abs=1e-5)
  assert found[0].arrays.keys() == found[1].arrays.keys()
  for name, rows in found[0].arrays.items():
    assert len(rows) == tiny.ROWS
    if rows.dtype.kind in 'fiub':
      np.testing.assert_allclose(rows, found[1].arrays[name], rtol=1e-4, atol=1e-5, err_msg=name)
