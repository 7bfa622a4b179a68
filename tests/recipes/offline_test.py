"""Recipes of objectives that learn from given responses: the reference, and how states lie."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax.data import pipeline
from rlhf_jax.models import roles
from rlhf_jax.objectives.dpo import DPOConfig
from tests import tiny


@pytest.mark.slow
def test_cached_reference_log_probs_are_the_online_ones(
  parents: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """Bit for bit, in the same order of data, and the trained parameters are the same."""
  configs = {
    kind: tiny.make_config('dpo', parents, objective=DPOConfig(reference=kind))
    for kind in ('online', 'cached')
  }
  built = {kind: tiny.build_recipe(config) for kind, config in configs.items()}
  states = {}
  for kind, stage in built.items():
    with jax.set_mesh(stage.mesh):
      states[kind] = stage.recipe.init()
  for step in range(4):  # past the end of the first epoch, in the middle of a batch
    batches = []
    for kind, stage in built.items():
      with jax.set_mesh(stage.mesh):
        host = stage.recipe.batch(step)
        batches.append(stage.recipe.prepare(states[kind], host).batch)
    jax.tree.map(np.testing.assert_array_equal, *batches)
  runs = {
    kind: tiny.run_stage(config, tmp_path / kind).outcome.run.params_sha256
    for kind, config in configs.items()
  }
  assert runs['cached'] == runs['online']


def test_an_evaluation_asks_what_the_stage_can_be_asked(parents: pathlib.Path) -> None:
  """Held-out likelihood of SFT, of every record once; preferences of DPO, whose start has none."""
  evaluation = dataclasses.replace(tiny.make_config('sft').evaluation, records=12)
  built = {
    case: tiny.build_recipe(tiny.make_config(case, parents, evaluation=evaluation))
    for case in ('sft', 'dpo')
  }
  found = {}
  for case, stage in built.items():
    with jax.set_mesh(stage.mesh):
      found[case] = stage.recipe.evaluate(stage.recipe.init().params, 0)
  names = ('loss', 'nll', 'entropy', 'sequence_logprob')
  assert set(found['sft'].scalars) == {f'held_out_{name}' for name in names}
  sft: Any = built['sft']
  columns = pipeline.encode_demonstrations(
    tiny.feedback_of(6).held_out.demonstrations, sft.tokenizer, tiny.make_config('sft').data
  )
  rows: Any = columns.take(np.arange(12))
  with jax.set_mesh(sft.mesh):
    params = sft.recipe.init().params['policy']
    logprobs = roles.policy_output(sft.model, params, rows, temperature=1.0).logprobs
  expected = -np.asarray(logprobs)[rows.response_mask].mean()
  for name in ('nll', 'loss'):
    assert found['sft'].scalars[f'held_out_{name}'] == pytest.approx(expected, rel=1e-5)
  scalars = found['dpo'].scalars
  assert scalars['held_out_accuracy'] == 0.5
  assert scalars['held_out_log_loss'] == pytest.approx(np.log(2), abs=1e-6)
