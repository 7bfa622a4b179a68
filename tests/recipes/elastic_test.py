"""A run goes on with other devices than it began on, and comes out the same to float error."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax import stages
from rlhf_jax.common import trees
from rlhf_jax.sharding.mesh import MeshConfig
from rlhf_jax.training.checkpoints import CheckpointConfig, Checkpoints
from rlhf_jax.training.writers import read_rows
from tests import tiny

pytestmark = pytest.mark.slow

STEPS, STOP = 4, 2
MESHES = {8: MeshConfig(data=2, fsdp=2, tensor=2), 1: MeshConfig()}


def run(config: Any, folder: pathlib.Path, devices: int, stop: int | None = None) -> None:
  """Runs a stage on so many devices, or until before the step `stop`."""
  config = dataclasses.replace(config, mesh=MESHES[devices])
  real = stages.train

  def train(name: str, recipe: Any, *arguments: Any) -> Any:
    def batch(step: int) -> Any:
      if step == stop:
        raise InterruptedError
      return recipe.batch(step)

    return real(name, recipe._replace(batch=batch), *arguments)

  with pytest.MonkeyPatch.context() as patch, tiny.devices(devices):
    patch.setattr(stages, 'train', train)
    if stop is None:
      stages.run_stage(config, folder, root=folder.parent)
    else:
      with pytest.raises(InterruptedError):
        stages.run_stage(config, folder, root=folder.parent)


def test_a_run_goes_on_with_other_devices(
  parents: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """PPO on 8 devices, then 1: parameters, optimizer state and metrics as on 1 throughout.

  Once it is finished, it is so on any mesh. (From 2 processes to 1:
  tests/experiments/cluster_processes_test.py.)
  """
  config = tiny.make_config('ppo', parents, steps=STEPS)
  config.optimizer.learning_rate = 1e-3
  config.checkpoint = CheckpointConfig(every=STOP)
  config.log.every = 1
  run(config, tmp_path / 'still', 1)
  run(config, tmp_path / 'moved', 8, stop=STOP)
  run(config, tmp_path / 'moved', 1)
  assert f'going on from step {STOP}' in capsys.readouterr().out
  records = [
    json.loads((tmp_path / name / 'record.json').read_text()) for name in ('moved', 'still')
  ]
  sizes = [record['mesh'] for record in [*records[0]['earlier'], *records]]
  assert [size['fsdp'] for size in sizes] == [2, 1, 1]
  with tiny.devices(1):
    abstract = tiny.build_recipe(config).recipe.abstract
  found = {}
  for name in ('moved', 'still'):
    checkpoints = Checkpoints(tmp_path / name / 'checkpoints', config.checkpoint)
    found[name] = trees.flatten(jax.device_get(checkpoints.restore(abstract)[0]))
    checkpoints.close()
  for name, leaf in found['still'].items():
    np.testing.assert_allclose(found['moved'][name], leaf, rtol=1e-3, atol=5e-5, err_msg=name)
  rows = [read_rows(tmp_path / name / 'metrics.jsonl') for name in ('moved', 'still')]
  assert [row['step'] for row in rows[0]] == list(range(1, STEPS + 1))
  for moved, still in zip(*rows, strict=True):
    moved.pop('seconds'), still.pop('seconds')
    assert moved == pytest.approx(still, rel=1e-3, abs=1e-4)
  run(config, tmp_path / 'moved', 8)
  assert 'finished already' in capsys.readouterr().out
