"""Every stage goes on from a checkpoint with the same bits; nothing else need be remembered."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.common import trees
from rlhf_jax.recipes import Built
from rlhf_jax.training.checkpoints import CheckpointConfig, Checkpoints
from rlhf_jax.training.optimizer import OptimizerConfig
from tests import tiny

pytestmark = pytest.mark.slow

HALF, WHOLE = 2, 4


def take_steps(built: Built, state: Any, start: int, stop: int) -> tuple[Any, list[dict]]:
  """The loop's own steps, and their metrics."""
  found = []
  with jax.set_mesh(built.mesh):
    for step in range(start, stop):
      prepared = built.recipe.prepare(state, built.recipe.batch(step))
      state = dataclasses.replace(state, carry=prepared.carry)
      state, metrics = built.recipe.update(state, prepared.batch)
      found.append(metrics_lib.values({**prepared.metrics, **metrics}))
  return state, found


@pytest.mark.parametrize('case', tiny.OBJECTIVES)
def test_a_stage_goes_on_from_a_checkpoint_with_the_same_bits(
  case: str, parents: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """Nothing that steps depend on lies outside the state: not in the recipe, not in its reward.

  A second recipe, made anew from the config, restores the state after half of the steps: baselines,
  controllers, slow copies, the order of the data and of minibatches, random numbers.
  """
  optimizer = OptimizerConfig(learning_rate=1e-2, schedule='cosine', warmup_updates=2)
  config = tiny.make_config(case, parents, steps=WHOLE, optimizer=optimizer)
  folder, keeping = tmp_path / 'checkpoints', CheckpointConfig(every=0)
  first = tiny.build_recipe(config)
  with jax.set_mesh(first.mesh):
    state = first.recipe.init()
  state, _ = take_steps(first, state, 0, HALF)
  checkpoints = Checkpoints(folder, keeping)
  checkpoints.save(HALF, state, {}, None)
  checkpoints.close()
  whole, expected = take_steps(first, state, HALF, WHOLE)

  second = tiny.build_recipe(config)
  checkpoints = Checkpoints(folder, keeping)
  restored, _ = checkpoints.restore(second.recipe.abstract)
  checkpoints.close()
  assert int(restored.step) == HALF
  again, found = take_steps(second, restored, HALF, WHOLE)
  assert found == expected
  leaves, wanted = trees.flatten(again), trees.flatten(whole)
  assert leaves.keys() == wanted.keys()
  for name in wanted:
    np.testing.assert_array_equal(leaves[name], wanted[name], err_msg=name)
