"""The configs on real human comparisons, for two steps each on the real file."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rlhf_jax import stages
from rlhf_jax.common.errors import DataError
from rlhf_jax.config import EvaluationConfig, ExperimentConfig, load_config
from rlhf_jax.runs import Run
from tests import tiny

STAGES = ('sft', 'reward_model', 'dpo', 'ppo', 'cpl')
FILE = 'hh_rlhf_test/harmless_base_test.jsonl.gz'


def get_config(stage: str) -> ExperimentConfig:
  return load_config(str(Path(__file__).parents[2] / 'configs' / f'hh_harmless_{stage}.py'))


@pytest.fixture(scope='module')
def runs(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
  """Every stage after those it starts from, on a twentieth of the records."""
  folder = tmp_path_factory.mktemp('hh')
  found: dict[str, Run] = {}
  for name in STAGES:
    config: Any = get_config(name)
    config.steps, config.batch_size = 2, 8
    config.data.path = str(shared_data / FILE)
    config.data.held_out = 0.95
    config.evaluation = EvaluationConfig(prompts=8, records=16, batch_size=8)
    config.log.tensorboard = False
    for role, parent in (('policy', 'sft'), ('reward_model', 'reward_model')):
      if getattr(config, role).init is not None:
        getattr(config, role).init = str(folder / parent)
    with tiny.devices(1):
      found[name] = stages.run_stage(config, folder / name, root=folder).run
  return found


@pytest.mark.slow
def test_every_stage_runs_on_the_real_file(runs: dict[str, Run]) -> None:
  """All end with finite numbers of what they are evaluated by."""
  answers = {'kl', 'proxy_reward', 'win_rate', 'length'}
  expected = {
    'sft': {'held_out_nll', 'length'},
    'reward_model': {'held_out_accuracy', 'held_out_log_loss'},
    'dpo': {'held_out_accuracy', *answers},
    'cpl': {'held_out_accuracy', *answers},
    'ppo': answers,
  }
  for name, run in runs.items():
    found = run.require_result()['evaluation']
    assert found.keys() >= expected[name], name
    assert all(math.isfinite(value) for value in found.values()), name


@pytest.mark.slow
def test_the_lines_without_a_chosen_response_are_set_aside(runs: dict[str, Run]) -> None:
  """Four lines of the file, with their numbers and the reason; the run's record counts them."""
  (folder,) = {run.folder.parent for run in runs.values()}
  (side_file,) = (folder / 'quarantine').iterdir()
  rejects = [json.loads(line) for line in side_file.read_text().splitlines()]
  assert [row['number'] for row in rejects] == [87, 517, 926, 1104]
  assert {row['reason'] for row in rejects} == {'empty response'}
  for run in runs.values():
    record = json.loads((run.folder / 'record.json').read_text())
    assert record['quarantined_records'] == 4


@pytest.mark.parametrize('stage', STAGES)
def test_without_the_path_the_error_says_how_to_give_it(stage: str, tmp_path: Path) -> None:
  """The default file name is found only where the file was put in the current folder."""
  config = get_config(stage)
  config.data.path = str(tmp_path / str(config.data.path))
  with pytest.raises(DataError, match='no such file.*--config.data.path'):
    stages.run_stage(config, tmp_path / 'run', root=tmp_path)
