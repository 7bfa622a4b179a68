"""A study: what it shares, what it reports, and that it goes on where it stopped."""

import copy
import dataclasses
import json

import pytest

from experiments import compare
from experiments.reporting.schema import validate_summary
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.config import EvaluationConfig
from rlhf_jax.runs import Run
from rlhf_jax.study import StudyConfig
from tests import tiny

EVALUATION = EvaluationConfig(every=2, prompts=8, records=8, batch_size=tiny.ROWS)


STAGES = {
  name: tiny.make_config(name, steps=2, evaluation=EVALUATION)
  for name in ('sft', 'reward_model', 'dpo', 'ppo')
}
UNASKED = dataclasses.replace(
  STAGES['reward_model'], evaluation=dataclasses.replace(EVALUATION, records=0)
)


def make_study(**changes):
  """Two objectives, two seeds, two steps."""
  stages = copy.deepcopy(STAGES)
  study = StudyConfig(
    name='tiny',
    sft=stages['sft'],
    reward_model=stages['reward_model'],
    objectives={'dpo': stages['dpo'], 'ppo': stages['ppo']},
    seeds=(3, 4),
    frontier_samples=16,
  )
  return dataclasses.replace(study, **changes)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp('study')
  with tiny.devices(1):
    return folder, compare.compare(make_study(), folder)


@pytest.mark.slow
def test_the_summary_has_every_objective_seed_and_step(finished):
  folder, summary = finished
  validate_summary(summary)
  assert json.loads((folder / 'summary.json').read_text()) == summary
  assert (folder / 'report.md').exists() and (folder / 'report.html').exists()
  found = {(row['objective'], row['seed'], row['step']) for row in summary['rows']}
  start = {('sft', 0, 2), ('sft', None, 2)}
  assert found == start | {(name, seed, 2) for name in ('dpo', 'ppo') for seed in (3, 4, None)}
  assert summary['optimum'] and 0.5 < summary['reward_model']['bayes_accuracy'] <= 1


@pytest.mark.slow
def test_all_objectives_start_from_the_same_parameters_on_the_same_data(finished):
  folder, summary = finished
  sft = Run(folder / 'sft')
  runs = [Run(folder / f'{name}_seed{seed}') for name in ('dpo', 'ppo') for seed in (3, 4)]
  assert {run.parents()['policy'].params_sha256 for run in runs} == {sft.params_sha256}
  records = [json.loads((run.folder / 'record.json').read_text()) for run in runs]
  assert len({record['data_fingerprint'] for record in records}) == 1
  start = next(row for row in summary['rows'] if row['objective'] == 'sft')
  assert start['kl']['mean'] == pytest.approx(0, abs=1e-6)
  # Seeds differ in what they do with the same start.
  assert len({run.params_sha256 for run in runs}) == 4


@pytest.mark.slow
def test_a_finished_study_is_reported_again_without_training(finished, monkeypatch, capsys):
  """What the frontier is estimated from is made again where its file is damaged."""
  folder, summary = finished
  (frontier,) = (folder / 'frontier').iterdir()
  whole = frontier.read_bytes()
  frontier.write_bytes(whole[: len(whole) // 2])
  times = {path: path.stat().st_mtime_ns for path in folder.glob('*/result.json')}
  monkeypatch.setattr('rlhf_jax.stages.train', None)  # any training would fail
  with tiny.devices(1):
    again = compare.compare(make_study(), folder)
  assert again is not None
  assert again['rows'] == summary['rows'] and again['optimum'] == summary['optimum']
  assert times == {path: path.stat().st_mtime_ns for path in folder.glob('*/result.json')}
  assert frontier.read_bytes() == whole and f'{frontier}: damaged' in capsys.readouterr().out


def test_objectives_that_are_not_matched_are_refused():
  study = make_study()
  study.objectives['ppo'].data.response_length = 5
  with pytest.raises(ConfigError, match=r'objectives.ppo.data.*response_length'):
    study.validate()


@pytest.mark.parametrize(
  ('changes', 'field'),
  [
    ({'seeds': ()}, 'seeds'),
    ({'seeds': (1, 1)}, 'seeds'),
    ({'objectives': {}}, 'objectives'),
    ({'objectives': {'../x': STAGES['dpo']}}, 'objectives.../x'),
    ({'frontier_samples': -1}, 'frontier_samples'),
    ({'kl_budget': -0.5}, 'kl_budget'),
    ({'kl_budget': float('nan')}, 'kl_budget'),
    ({'name': 3}, 'name'),
    ({'seeds': 3}, 'seeds'),
    ({'seeds': [0, 1]}, 'seeds'),
    ({'seeds': (0, 1.5)}, 'seeds'),
    ({'seeds': (True, 2)}, 'seeds'),
    ({'frontier_samples': 10.5}, 'frontier_samples'),
    ({'kl_budget': '3'}, 'kl_budget'),
    ({'sft': None}, 'sft'),
    ({'objectives': ['dpo']}, 'objectives'),
    ({'objectives': {'dpo': {'beta': 1}}}, 'objectives.dpo'),
    ({'objectives': {'judge': STAGES['reward_model']}}, 'objectives.judge.objective'),
    ({'reward_model': STAGES['dpo']}, 'reward_model.objective'),
    ({'reward_model': UNASKED}, 'reward_model.evaluation.records'),
  ],
)
def test_impossible_studies_are_refused(changes, field):
  with pytest.raises(ConfigError) as caught:
    make_study(**changes).validate()
  assert caught.value.field == field
