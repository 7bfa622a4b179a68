"""The program that asks a finished run's questions again."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_jax.config import EvaluationConfig, RewardModelInitConfig
from rlhf_jax.rollout.config import RewardConfig, RolloutConfig
from rlhf_jax.training.writers import read_rows
from tests import tiny
from tests.experiments.programs import message, run_program

pytestmark = pytest.mark.slow

ASKED = EvaluationConfig(prompts=8, records=10, batch_size=tiny.ROWS)
POLICY = {'kl', 'proxy_reward', 'gold_reward', 'win_rate', 'length', 'finished'}
PREFERENCES = {'held_out_accuracy', 'held_out_log_loss', 'held_out_calibration_error'}


@pytest.fixture(scope='module')
def runs(parents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Finished runs of DPO, PPO and another reward model that were evaluated along their way."""
  folder = tmp_path_factory.mktemp('runs')
  judge = RewardModelInitConfig(init=str(parents / 'reward_model'))
  for case in ('dpo', 'ppo', 'reward_model'):
    config = tiny.make_config(case, parents, steps=2, seed=1, evaluation=ASKED)
    if case == 'dpo':
      config.reward_model = judge
    tiny.run_stage(config, folder / case)
  return folder


def evaluate(run: Path, *flags: str) -> tuple[str, dict[str, Any]]:
  """What the program prints and writes."""
  out = run.parent / 'out.json'
  done = run_program('evaluate', f'--run={run}', f'--json={out}', *flags)
  assert done.returncode == 0, done.stderr
  return done.stdout, json.loads(out.read_text())


@pytest.mark.parametrize(
  ('case', 'names'),
  [('dpo', POLICY | PREFERENCES), ('ppo', POLICY), ('reward_model', PREFERENCES)],
)
def test_the_numbers_are_those_of_the_run(runs: Path, case: str, names: set[str]) -> None:
  """With its own settings the saved parameters give the last evaluation of training again."""
  printed, written = evaluate(runs / case)
  last = read_rows(runs / case / 'evaluations.jsonl')[-1]
  assert written['metrics'].keys() == names
  assert written['objective'] == case and written['step'] == last['step'] == 2
  for name, metric in written['metrics'].items():
    np.testing.assert_allclose(metric['mean'], last[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert name in printed
    if name == 'held_out_calibration_error':
      assert metric['low'] is metric['high'] is metric['count'] is None
    else:
      assert metric['low'] <= metric['mean'] <= metric['high']
      assert metric['count'] == (10 if name.startswith('held_out') else 8)


def test_sft_is_asked_for_likelihood(parents: Path) -> None:
  """Its own settings ask nothing; flags do, and more records narrow the interval."""
  assert 'nothing to ask' in message(run_program('evaluate', f'--run={parents / "sft"}'))
  metrics = evaluate(parents / 'sft', '--records=12')[1]['metrics']
  likelihoods = {'held_out_nll', 'held_out_sequence_logprob', 'held_out_entropy'}
  assert metrics.keys() == {'held_out_loss', *likelihoods}
  assert metrics['held_out_loss'] == metrics['held_out_nll']
  assert 0 < metrics['held_out_nll']['low'] < metrics['held_out_nll']['high']


def test_another_reference_and_reward_model(runs: Path, parents: Path) -> None:
  """Against itself as reference the KL is 0; another judge gives other scores."""
  own = evaluate(runs / 'dpo')[1]['metrics']
  _, written = evaluate(
    runs / 'dpo', f'--reference={runs / "dpo"}', f'--reward_model={runs / "reward_model"}'
  )
  assert written['reference'] == str(runs / 'dpo')
  assert written['reward_model'] == str(runs / 'reward_model')
  np.testing.assert_allclose(written['metrics']['kl']['mean'], 0.0, atol=1e-6)
  assert own['kl']['mean'] > 1e-4
  assert written['metrics']['proxy_reward']['mean'] != own['proxy_reward']['mean']
  # The same answers to the same prompts, whoever judges them.
  assert written['metrics']['gold_reward'] == own['gold_reward']


def test_models_are_divided_as_flags_say(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """On eight devices the numbers are those of one; parts that do not divide them are refused."""
  own = evaluate(runs / 'reward_model', '--records=8')[1]['metrics']
  monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '8')
  divided = evaluate(runs / 'reward_model', '--records=8', '--fsdp=2', '--tensor=2')[1]['metrics']
  for name, metric in own.items():
    np.testing.assert_allclose(divided[name]['mean'], metric['mean'], rtol=1e-5, atol=1e-6)
  said = message(run_program('evaluate', f'--run={runs / "dpo"}', '--fsdp=3'))
  assert '--fsdp=3 --tensor=1: expected a product that divides the 8 devices' in said


def test_best_of_n(runs: Path, parents: Path) -> None:
  """More to choose from is better for the judge; the best of one is the policy; the KL is known."""
  _, written = evaluate(runs / 'dpo', '--best_of_n=1,4,8', '--prompts=8', '--records=0')
  metrics = written['metrics']
  proxy = [metrics[f'best_of_{n}_proxy_reward']['mean'] for n in (1, 4, 8)]
  assert proxy == sorted(proxy) and proxy[0] < proxy[2]
  assert metrics['best_of_8_gold_reward']['count'] == 8
  kl = [metrics[f'best_of_{n}_kl']['mean'] for n in (1, 4)]
  np.testing.assert_allclose(kl, [0, np.log(4) - 3 / 4], atol=1e-6)
  said = message(run_program('evaluate', f'--run={parents / "sft"}', '--best_of_n=4'))
  assert '--best_of_n=4' in said and '--prompts' in said
  asked = ('evaluate', f'--run={parents / "sft"}', '--best_of_n=4', '--prompts=4')
  said = message(run_program(*asked))
  assert '--best_of_n=4' in said and '--reward_model' in said
  said = message(run_program('evaluate', f'--run={runs / "dpo"}', '--best_of_n=four'))
  assert 'expected numbers' in said


def test_a_function_that_paid_the_run_is_asked_again(parents: Path, tmp_path: Path) -> None:
  """Its numbers are those of training; another file under its name would pay something else."""
  file = tmp_path / 'length.py'
  file.write_text('def score(prompts, responses):\n  return [len(text) for text in responses]\n')
  rollout = RolloutConfig(rewards=(RewardConfig(source=f'{file}:score'),))
  config = tiny.make_config('rloo', parents, steps=1, rollout=rollout, evaluation=ASKED)
  config.reward_model.init = None
  tiny.run_stage(config, tmp_path / 'run')
  last = read_rows(tmp_path / 'run' / 'evaluations.jsonl')[-1]
  metrics = evaluate(tmp_path / 'run')[1]['metrics']
  assert metrics['reward']['mean'] == pytest.approx(last['reward'])
  file.write_text(file.read_text() + '\n')
  said = message(run_program('evaluate', f'--run={tmp_path / "run"}'))
  assert 'length.py' in said and 'not as it was' in said
  # A directory that came from elsewhere is data: it cannot bring the program that is run on it.
  own = tmp_path / 'run' / 'length.py'
  own.write_text(f'open({str(tmp_path / "ran")!r}, "w")\n{file.read_text()}')
  origin = tmp_path / 'run' / 'config.json'
  origin.write_text(origin.read_text().replace(str(file), str(own)))
  said = message(run_program('evaluate', f'--run={tmp_path / "run"}'))
  assert 'a program in its own folder' in said and not (tmp_path / 'ran').exists()


def test_a_run_of_another_kind_is_refused(runs: Path) -> None:
  """A policy is no reward model, and a reward model no reference."""
  for flag, run in (('reward_model', 'ppo'), ('reference', 'reward_model')):
    said = message(run_program('evaluate', f'--run={runs / "dpo"}', f'--{flag}={runs / run}'))
    assert f'--{flag}=' in said and ': expected a ' in said


def test_unfinished_runs_and_other_data_are_refused(runs: Path, tmp_path: Path) -> None:
  """Numbers on records that training may have seen would be no evaluation."""
  shutil.copytree(runs / 'dpo', tmp_path / 'other')
  path = tmp_path / 'other' / 'config.json'
  origin = json.loads(path.read_text())
  origin['identity']['data'] = 'f' * 64
  path.write_text(json.dumps(origin))
  assert 'other records' in message(run_program('evaluate', f'--run={tmp_path / "other"}'))
  (tmp_path / 'other' / 'result.json').unlink()
  assert 'not finished' in message(run_program('evaluate', f'--run={tmp_path / "other"}'))
