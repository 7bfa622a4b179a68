"""Benchmarks time stages like any other: rows are full, and every number of the output is there."""

import dataclasses
import json
import pathlib
import types
from typing import Any

import pytest

from benchmarks import run, workloads
from rlhf_jax.data.sources import load as load_feedback
from rlhf_jax.stages import resolve
from tests import tiny

TINY = dataclasses.replace(tiny.MODEL, vocab_size=40, vocab_multiple=1, max_length=512)


@pytest.fixture(autouse=True)
def tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(workloads, 'SIZES', {'SMALL': TINY})
  give(monkeypatch, SIZE='SMALL', DTYPE='float32', REPEATS=2)


def give(monkeypatch: pytest.MonkeyPatch, **flags: Any) -> None:
  for name, value in flags.items():
    monkeypatch.setattr(run, name, types.SimpleNamespace(value=value))


@pytest.mark.slow
def test_no_token_is_padding(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Prompts and responses have just the tokens of the job."""
  give(monkeypatch, JOB='reward')
  config = run.stage(tmp_path)
  feedback = load_feedback(config.data)
  job = workloads.JOBS['reward']
  for comparison in feedback.train.comparisons:
    assert len(str(comparison.prompt).split()) == job.prompt - 1
    for text in (comparison.chosen, comparison.rejected):
      assert len(text.split()) == job.response - 1


@pytest.mark.slow
@pytest.mark.parametrize('job', ['dpo_cached', 'generate', 'grpo_iteration'])
def test_a_job_is_timed(job: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(workloads.JOBS, job, dataclasses.replace(workloads.JOBS[job], response=8))
  monkeypatch.setattr(run.measuring, '_SIDE', {'cpu': 64})
  give(monkeypatch, JOB=job)
  numbers = run.measure(tmp_path)
  json.dumps(numbers)
  assert numbers['job'] == job and numbers['flops'] > 0 and numbers['utilisation'] > 0
  least, most = numbers['seconds']['least'], numbers['seconds']['most']
  assert 0 < least <= numbers['seconds']['median'] <= most < numbers['first_step_seconds']
  tokens = numbers['tokens_per_second'] * numbers['seconds']['median']
  rows = {'dpo_cached': 16 * (128 + 8), 'generate': 32 * 8, 'grpo_iteration': 32 * 8}[job]
  assert tokens == pytest.approx(rows)
  if job != 'generate':
    assert resolve(run.stage(tmp_path), tmp_path).parents['policy'].require_result()['step'] == 1
