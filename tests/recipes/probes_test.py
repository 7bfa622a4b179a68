"""What evaluations ask of held-out records: the objective's own loss, row by row."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.common.metrics import Mean
from rlhf_jax.objectives import demands_of, objective_of
from rlhf_jax.recipes.offline import encode, make_actors, make_preparation
from rlhf_jax.recipes.parts import load_parts
from rlhf_jax.runs import Run
from rlhf_jax.sharding.mesh import put_batch
from tests import tiny

pytestmark = pytest.mark.slow


def asks_for_a_loss(case: str) -> bool:
  objective = objective_of(tiny.OBJECTIVES[case]())
  given = objective.data != 'prompts' and objective.curate is None
  alone = demands_of(tiny.OBJECTIVES[case]()).group == 1
  return given and alone and objective.difference is None


CASES = [case for case in tiny.OBJECTIVES if asks_for_a_loss(case)]


def make_config(case: str, parents: pathlib.Path, records: int, **changes: Any) -> Any:
  evaluation = dataclasses.replace(tiny.make_config(case).evaluation, records=records)
  return tiny.make_config(case, parents, evaluation=evaluation, **changes)


def near(params: Any) -> Any:
  """Other parameters than those of the reference."""
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), params)


def test_there_are_such_cases() -> None:
  assert {'sft', 'kto', 'reward_listwise', 'reward_rating', 'reward_process'} <= set(CASES)


@pytest.mark.parametrize('case', CASES)
def test_held_out_losses_are_the_objectives(case: str, parents: pathlib.Path) -> None:
  """Totals and weights of single rows add up to the loss of all of them, metrics likewise."""
  config = make_config(case, parents, tiny.ROWS)
  built = tiny.build_recipe(config)
  runs = {role: Run(init) for role, (init, _) in config.inits().items()}
  with tiny.devices(1):
    parts = load_parts(config, runs, tiny.feedback_of(config.data.response_length))
  actors = make_actors(parts)
  objective = objective_of(config.objective)
  with jax.set_mesh(built.mesh):
    params = near(built.recipe.init().params)
    found = built.recipe.evaluate(params, 0)
    batch = put_batch(encode(parts, 'held_out', tiny.ROWS).take(np.arange(tiny.ROWS)), parts.mesh)
    batch = make_preparation(parts, actors)(params, batch)
    mean, metrics = objective.loss(config.objective, actors, params, batch)
  expected = {'loss': mean, **{k: v for k, v in metrics.items() if isinstance(v, Mean)}}
  assert {f'held_out_{name}' for name in expected} == found.scalars.keys()
  for name, value in expected.items():
    rows = {part: found.arrays[f'held_out_{name}_{part}'] for part in ('total', 'weight')}
    assert rows['total'].shape == rows['weight'].shape == (tiny.ROWS,)
    assert rows['weight'].sum() == pytest.approx(float(value.weight), rel=1e-6)
    assert rows['total'].sum() == pytest.approx(float(value.total), rel=1e-4, abs=1e-4), name
    number = metrics_lib.values({name: value})[name]
    assert found.scalars[f'held_out_{name}'] == pytest.approx(number, rel=1e-4, abs=1e-5), name
  assert abs(found.scalars['held_out_loss']) > 1e-3


@pytest.mark.parametrize('case', ['sft', 'reward_process'])
def test_rows_that_fill_up_the_last_batch_do_not_count(case: str, parents: pathlib.Path) -> None:
  """12 records in batches of 8: the first 8 and then 4 more, each once."""
  found = {}
  for records in (8, 12):
    built = tiny.build_recipe(make_config(case, parents, records))
    with jax.set_mesh(built.mesh):
      found[records] = built.recipe.evaluate(built.recipe.init().params, 0)
  for name, rows in found[12].arrays.items():
    assert rows.shape == (12,)
    np.testing.assert_allclose(rows[:8], found[8].arrays[name], rtol=1e-5, atol=1e-6)
  totals, weights = (found[12].arrays[f'held_out_loss_{part}'] for part in ('total', 'weight'))
  assert found[12].scalars['held_out_loss'] == pytest.approx(totals.sum() / weights.sum(), rel=1e-5)


@pytest.mark.parametrize('case', ['dpo', 'cpl_dense'])
def test_batches_of_evaluation_need_not_divide_by_the_accumulation(
  case: str, parents: pathlib.Path
) -> None:
  """They are read in one piece: the answers are those without any accumulation."""
  found = []
  for accumulation in (1, 3):
    config = make_config(case, parents, 10, batch_size=24, accumulation=accumulation)
    built = tiny.build_recipe(config)
    with jax.set_mesh(built.mesh):
      found.append(built.recipe.evaluate(near(built.recipe.init().params), 0).scalars)
  assert found[1] == pytest.approx(found[0], rel=1e-5)
