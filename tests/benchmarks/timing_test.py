"""Benchmarks time stages like any other: rows are full, and every number of the output is there."""

import dataclasses
import json
import pathlib

import pytest

from benchmarks import timing, workloads
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.stages import resolve
from tests import tiny

TINY = dataclasses.replace(tiny.MODEL, vocab_size=40, vocab_multiple=1, max_length=512)


@pytest.fixture(autouse=True)
def tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(workloads, 'SIZES', {'SMALL': TINY})


def test_no_token_is_padding() -> None:
  """Prompts and responses have just the tokens of the job."""
  job = workloads.JOBS['reward']
  for comparison in workloads.comparisons('SMALL', job):
    assert len(comparison['prompt'].split()) == job.prompt - 1
    for name in ('chosen', 'rejected'):
      assert len(comparison[name].split()) == job.response - 1
      assert set(comparison[name].split()) <= set(workloads.words('SMALL'))


@pytest.mark.slow
@pytest.mark.parametrize('job', ['dpo_cached', 'generate', 'grpo_iteration'])
def test_a_job_is_timed(job: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(workloads.JOBS, job, dataclasses.replace(workloads.JOBS[job], response=8))
  monkeypatch.setattr(timing.measuring, '_SIDE', {'cpu': 64})
  asked = timing.Timing(job, 'SMALL', 'float32', 2)
  numbers = timing.measure(asked, tmp_path)
  json.dumps(numbers)
  assert numbers['job'] == job and numbers['flops'] > 0 and numbers['utilisation'] > 0
  ours = numbers['seconds']['step']['ours']
  assert 0 < ours['least'] <= ours['median'] <= ours['most'] < numbers['first_seconds']['step']
  assert numbers['compile_seconds'] > 0 and numbers['peer'] is None
  # Rollouts wait for the host within a step.
  assert 0 <= numbers.get('idle_share', 0) < 1 and ('idle_share' in numbers) == (
    job == 'dpo_cached'
  )
  tokens = numbers['tokens_per_second'] * ours['median']
  rows = {'dpo_cached': 16 * (128 + 8), 'generate': 32 * 8, 'grpo_iteration': 32 * 8}[job]
  assert tokens == pytest.approx(rows)
  if job != 'generate':
    parents = resolve(timing.stage(asked, tmp_path), tmp_path).parents
    assert parents['policy'].require_result()['step'] == 1


@pytest.mark.slow
def test_a_checkpoint_is_read_and_written(tmp_path: pathlib.Path) -> None:
  """Both are timed, and what is written is gone: the folder holds what was read alone."""
  asked = timing.Timing('load_export', 'SMALL', 'float32', 2)
  numbers = timing.measure(asked, tmp_path)
  json.dumps(numbers)
  (file,) = (tmp_path / 'SMALL').rglob('*.safetensors')
  assert numbers['bytes'] == file.stat().st_size
  for part in ('load', 'export'):
    ours = numbers['seconds'][part]['ours']
    assert len(ours['all']) == 2 and ours['least'] > 0
    assert numbers['bytes_per_second'][part] == pytest.approx(numbers['bytes'] / ours['median'])


def test_a_value_function_of_its_own_costs_its_own_operations() -> None:
  model = workloads.SIZES['SMALL']

  def flops(job: str) -> float:
    return timing.work(
      job, ExperimentConfig(name=job, objective=workloads.JOBS[job].objective()), model
    )[1]

  assert 1.2 * flops('ppo_iteration') < flops('ppo_separate') < 2 * flops('ppo_iteration')
