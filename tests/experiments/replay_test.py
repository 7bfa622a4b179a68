"""The program that makes a bad step again and explains it."""

import json
import pathlib
import re

import pytest

from rlhf_jax.common.errors import NonFiniteError
from rlhf_jax.training import dumps
from rlhf_jax.training.health import HealthConfig, SpikeConfig
from tests import tiny
from tests.experiments.programs import message, run_program
from tests.training.skipping_test import reward_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def stopped(parents: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A run of RLOO that a reward of -inf has ended."""
  folder = tmp_path_factory.mktemp('replay')
  with pytest.raises(NonFiniteError, match=r'experiments\.replay --run='):
    tiny.run_stage(reward_config('rloo', parents, folder, 16, '-inf'), folder / 'run')
  return folder / 'run'


def test_it_explains_and_writes_what_is_documented(
  stopped: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '1')
  out = stopped.parent / 'out.json'
  done = run_program('replay', f'--run={stopped}', f'--json={out}')
  assert done.returncode == 0, done.stderr
  written = json.loads(out.read_text(), parse_constant=lambda text: pytest.fail(text))
  assert written['schema'] == 1 and written['reproduced'] == 'bits' and written['found']
  (rows,) = written['not_finite']['rewards'].values()
  assert [sample['row'] for sample in written['samples']] == rows
  step = written['step']
  assert f'step {step}, made again from the beginning: bit for bit what it was.' in done.stdout
  assert f'reward.py:score: -inf in row{"s" if len(rows) > 1 else ""} {rows[0]}' in done.stdout
  assert repr(written['samples'][0]['texts'][1]) in done.stdout
  assert f'update {written["update"] + 1} of {written["updates"]}: loss' in done.stdout
  assert written['explanation'][0] in done.stdout
  assert written['metrics']['score'] in ('-inf', 'nan') and written['rows']


def test_a_spike_is_explained(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """All is finite: it is said how large the gradient is, and which rows have the largest."""
  monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '1')
  spike = SpikeConfig(factor=1.001, window=2, action='stop')
  config = tiny.make_config('sft', health=HealthConfig(gradient_spike=spike))
  with pytest.raises(NonFiniteError, match=r'health\.gradient_spike\.action=skip'):
    tiny.run_stage(config, tmp_path / 'run')
  (step,) = dumps.steps(tmp_path / 'run')
  values = dumps.load(tmp_path / 'run', step).values
  done = run_program('replay', f'--run={tmp_path / "run"}', f'--json={tmp_path / "out.json"}')
  assert done.returncode == 0, done.stderr
  written = json.loads((tmp_path / 'out.json').read_text())
  assert written['reproduced'] == 'bits' and not written['found']
  assert written['spike'] == pytest.approx(values['gradient_spike_ratio']) and step > 2
  assert 'times the median of those before it' in done.stdout
  norms = {row['row']: row['gradient_norm'] for row in written['rows']}
  assert (
    f'alone: {max(norms.values()):.4g} (row {max(norms, key=lambda x: norms[x])})' in done.stdout
  )


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--run={run}', '--step=9999'], r'--step=9999: .* has kept step'),
    (['--run={parents}/sft'], 'no step was kept'),
    (['--run={parents}'], 'not a run directory'),
    (['--run={run}', '--json=nowhere/out.json'], 'there is no folder nowhere'),
  ],
)
def test_mistakes_are_named(
  flags: list[str], words: str, stopped: pathlib.Path, parents: pathlib.Path
) -> None:
  given = [flag.format(run=stopped, parents=parents) for flag in flags]
  said = message(run_program('replay', *given))
  assert re.search(words, said), said


def test_another_reward_is_no_replay(stopped: pathlib.Path) -> None:
  """The function's file has changed since."""
  file = stopped.parent / 'reward.py'
  whole = file.read_text()
  file.write_text(whole + '# changed\n')
  try:
    assert 'is not as it was when it paid the run' in message(
      run_program('replay', f'--run={stopped}')
    )
  finally:
    file.write_text(whole)
