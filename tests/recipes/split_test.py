"""How a batch is split over microbatches and devices changes neither loss nor gradients."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.common import trees
from rlhf_jax.objectives import PPOConfig
from rlhf_jax.recipes import Built
from rlhf_jax.sharding.mesh import MeshConfig, put_batch
from rlhf_jax.training.optimizer import OptimizerConfig
from rlhf_jax.training.state import TrainState
from tests import tiny

# Mesh (data, fsdp, tensor), whose product is the number of devices, and microbatches.
SPLITS = {
  'accumulation 4': ((1, 1, 1), 4),
  'mesh (8, 1, 1)': ((8, 1, 1), 1),
  'mesh (2, 2, 2), accumulation 2': ((2, 2, 2), 2),
  'mesh (1, 4, 2)': ((1, 4, 2), 1),
}


def build(case: str, start: pathlib.Path, mesh: tuple[int, int, int], accumulation: int) -> Built:
  """A stage whose one update is `params - gradient`."""
  config = tiny.make_config(
    case,
    start,
    steps=1,
    accumulation=accumulation,
    optimizer=OptimizerConfig(name='sgd', learning_rate=1.0, clip_norm=0.0),
    mesh=MeshConfig(data=mesh[0], fsdp=mesh[1], tensor=mesh[2]),
  )
  if case == 'ppo':
    config.objective = PPOConfig(epochs=1, minibatches=1)
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

  return dataclasses.replace(state, params=jax.tree.map(move, state.params))


def take_step(built: Built, prepared: Any = None) -> Step:
  """One step near the initial state; on a given prepared batch, if there is one."""
  recipe = built.recipe
  with jax.set_mesh(built.mesh):
    state = moved(recipe.init(), 0)
    own = recipe.prepare(state, recipe.batch(0))
    state = moved(state, 1)
    batch = own.batch if prepared is None else put_batch(prepared, built.mesh)
    host = jax.device_get(own.batch)
    before = jax.device_get(trees.flatten(state.params))
    after, metrics = recipe.update(dataclasses.replace(state, carry=own.carry), batch)
    after = jax.device_get(trees.flatten(after.params))
  gradients = {name: before[name] - after[name] for name in before}
  return Step(host, before, gradients, metrics_lib.values({**own.metrics, **metrics}))


@pytest.fixture(scope='module', autouse=True)
def quick_compilation() -> Iterator[None]:
  """Programs that are used once are not worth optimising; the property is not one of bits."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='module')
def whole(parents: pathlib.Path) -> Any:
  """`whole(case)`: the step on one device in one piece."""
  done: dict[str, Step] = {}

  def step(case: str) -> Step:
    if case not in done:
      done[case] = take_step(build(case, parents, (1, 1, 1), 1))
    return done[case]

  return step


@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('case', tiny.OBJECTIVES)
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
