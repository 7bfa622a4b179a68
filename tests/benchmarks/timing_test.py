"""Benchmarks time stages like any other: rows are full, and every number of the output is there."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence

import jax
import pytest

from benchmarks import measuring, startup, timing, workloads
from rlhf_jax.common.errors import UserError
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.stages import resolve
from tests.benchmarks.tiny_program import TINY


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
  monkeypatch.setattr(measuring, 'ceiling', lambda dtype: 1e9)
  monkeypatch.setattr(measuring, '_COPIED', {'cpu': 1000})
  asked = timing.Timing(job, 'SMALL', 'float32', 2)
  numbers = timing.measure(asked, tmp_path)
  json.dumps(numbers)
  assert numbers['job'] == job and numbers['flops'] > 0 and numbers['utilisation'] > 0
  ours = numbers['seconds']['step']['ours']
  assert 0 < ours['least'] <= ours['median'] <= ours['most'] < numbers['first_seconds']['step']
  assert numbers['compile_seconds'] > 0 and numbers['peer'] is None
  assert 0 <= numbers['idle_share'] < 1
  # The job's mesh has all devices, each with a ceiling of its own.
  assert numbers['ceiling_flops_per_second'] == jax.device_count() * 1e9
  assert numbers['utilisation'] == pytest.approx(
    numbers['flops'] / ours['median'] / jax.device_count() / 1e9
  )
  assert set(numbers.get('parts_seconds', ())) == (
    {'rollout', 'score', 'update'} if job == 'grpo_iteration' else set()
  )
  assert all(seconds > 0 for seconds in numbers.get('parts_seconds', {}).values())
  assert (numbers.get('bandwidth_share', 0) > 0) == (job == 'generate')
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


@pytest.mark.slow
def test_checkpoints_have_the_type_that_is_asked_for(tmp_path: pathlib.Path) -> None:
  """Half as many bytes a number."""
  size = {
    dtype: timing.measure(timing.Timing('load_export', 'SMALL', dtype, 1), tmp_path)['bytes']
    for dtype in ('float32', 'bfloat16')
  }
  # Both tables, the matrices and the norms; the headers differ by a few bytes.
  count = 2 * 16 * 40 + 4 * 16 * 16 + 3 * 16 * 32 + 3 * 16
  assert size['float32'] - size['bfloat16'] == pytest.approx(2 * count, abs=64)


@pytest.mark.slow
def test_parents_are_made_apart(tmp_path: pathlib.Path) -> None:
  """Nothing is compiled here for them, so that neither their seconds nor memory are the job's."""
  asked = timing.Timing('ppo_iteration', 'SMALL', 'float32', 1)
  with measuring.compiling() as seconds:
    timing.stage(asked, tmp_path)
  assert not seconds
  for role in ('policy', 'reward_model'):
    assert json.loads((tmp_path / 'SMALL' / role / 'result.json').read_text())['step'] == 1


@pytest.mark.slow
def test_parents_that_fail_end_the_job(tmp_path: pathlib.Path) -> None:
  config = ExperimentConfig(name='broken', steps=-1)
  with pytest.raises(UserError, match='broken: its run in .* failed'):
    timing.run_apart(config, tmp_path / 'run', tmp_path)


@pytest.mark.slow
def test_starts_of_our_program_are_timed(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """`compile` from end to end: its command, what that says, and its steps, of a tiny size."""
  real = startup.command
  folders = []

  def command(size: str, dtype: str, folder: str) -> Callable[[str], Sequence[str]]:
    def ours(cache: str) -> list[str]:
      python, option, program, *flags = real(size, dtype, folder)(cache)
      folders.append(cache)
      return [python, option, 'tests.benchmarks.tiny_program', program, *flags]

    return ours

  monkeypatch.setattr(startup, 'command', command)
  numbers = timing.measure(timing.Timing('compile', 'SMALL', 'float32', 1), tmp_path)
  json.dumps(numbers)
  assert len(set(folders)) == 2 and numbers['peak_bytes']['host'] > 2**20
  assert set(numbers['seconds']) == set(numbers['first_seconds']) == {'cold', 'warm'}
  for row in numbers['seconds'].values():
    assert len(row['ours']['all']) == 1 and row['ours']['least'] > 0


# Of each job: prompts, responses to each, tokens of a prompt and of a response; how often a step
# reads them all, a gradient being three times, and how often it makes the logits of responses.
PASSES = {
  'sft': (8, 1, 2, 254, 3, 3),
  'reward': (8, 2, 128, 128, 3, 0),
  'dpo': (8, 2, 128, 128, 3 + 1, 3 + 1),
  'dpo_cached': (8, 2, 128, 128, 3, 3),
  'generate': (32, 1, 64, 128, 1, 1),
  'decode': (64, 1, 64, 128, 1, 1),
  # Sampling, the policy again, the reference, the reward model; 4 epochs.
  'ppo_iteration': (32, 1, 64, 64, 1 + 1 + 1 + 1 + 4 * 3, 1 + 1 + 1 + 4 * 3),
  'ppo_separate': (32, 1, 64, 64, 1 + 1 + 1 + 1 + 1 + 2 * 4 * 3, 1 + 1 + 1 + 4 * 3),
  # The sampler's own log-probs are learnt from.
  'grpo_iteration': (4, 8, 64, 64, 1 + 1 + 1 + 3, 1 + 1 + 3),
}


@pytest.mark.parametrize('job', workloads.JOBS)
def test_operations_are_those_that_are_counted_by_hand(job: str, tmp_path: pathlib.Path) -> None:
  """Of a decoder of width 16 with one layer, an MLP of 32 and 40 ids."""
  prompts, copies, prompt, response, reads, readouts = PASSES[job]
  rows = prompts * copies
  tokens = prompts * prompt + rows * (response - 1)
  # Each token sees itself and those before it; nothing is predicted from the last one.
  seen = prompts * sum(range(1, prompt + 1)) + rows * sum(range(prompt + 1, prompt + response))
  weights = 4 * 16 * 16 + 3 * 16 * 32
  reading = 2 * weights * tokens + 2 * 2 * 16 * seen
  readout = 2 * 16 * 40 * rows * response
  config = workloads.config(job, 'SMALL', tmp_path, tmp_path / 'tokenizer')
  found = timing.work(job, config, TINY)[1]
  assert found == reads * reading + readouts * readout


def test_large_sizes_have_rows_of_2048_tokens(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setitem(workloads.SIZES, '1B', TINY)
  for job in ('sft', 'reward', 'dpo'):
    data = workloads.config(job, '1B', tmp_path, tmp_path / 'tokenizer').data
    assert data.prompt_length + data.response_length == 2048


def test_a_value_function_of_its_own_costs_its_own_operations() -> None:
  model = workloads.SIZES['SMALL']

  def flops(job: str) -> float:
    return timing.work(
      job, ExperimentConfig(name=job, objective=workloads.JOBS[job].objective()), model
    )[1]

  assert 1.2 * flops('ppo_iteration') < flops('ppo_separate') < 2 * flops('ppo_iteration')
