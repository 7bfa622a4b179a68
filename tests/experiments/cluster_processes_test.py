"""Programs in two processes: the numbers of one process, written once; stopped and ended as one."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax import stages
from rlhf_jax.common import trees
from rlhf_jax.models import hf_export
from rlhf_jax.models.roles import abstract_reward_model
from rlhf_jax.recipes.parts import abstract_decoder, abstract_head
from rlhf_jax.runs import Run
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh
from rlhf_jax.training.writers import read_rows
from tests.experiments import pair
from tests.experiments.programs import ROOT

pytestmark = pytest.mark.slow

TIMEOUT = 300


class Pair:
  """A program that runs as two processes of four simulated devices each."""

  def __init__(
    self,
    name: str,
    *flags: str,
    own: tuple[tuple[str, ...], ...] = ((), ()),
    environment: Mapping[str, str] | None = None,
  ):
    with socket.socket() as free:
      free.bind(('localhost', 0))
      port = free.getsockname()[1]
    self.processes = [
      subprocess.Popen(
        [
          *(sys.executable, '-m', f'experiments.{name}', *flags, *own[number]),
          *(f'--coordinator_address=localhost:{port}', '--num_processes=2'),
          f'--process_id={number}',
          f'--cache_dir={os.environ["JAX_COMPILATION_CACHE_DIR"]}',
        ],
        cwd=ROOT,
        env={
          **os.environ,
          'JAX_NUM_CPU_DEVICES': '4',
          'PYTHONPATH': str(ROOT),
          **{name: text.format(number=number) for name, text in (environment or {}).items()},
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      for number in range(2)
    ]

  def end(self) -> tuple[list[int], list[str]]:
    """Exit codes, and what each process said."""
    try:
      said = [process.communicate(timeout=TIMEOUT) for process in self.processes]
    finally:
      for process in self.processes:
        process.kill()
    return [process.returncode for process in self.processes], [out + error for out, error in said]


def config_flag(case: str) -> str:
  return f'--config={pair.__file__}:{case}'


@pytest.fixture(scope='module')
def one(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """PPO, DPO and what they start from in this process, on its eight devices."""
  folder = tmp_path_factory.mktemp('one')
  stages.run_stage(pair.get_config('ppo'), folder / 'ppo', root=folder)
  dpo = pair.get_config('dpo')
  dpo.policy.init = str(folder_of('sft', folder))
  stages.run_stage(dpo, folder / 'dpo', root=folder)
  return folder


def folder_of(case: str, root: pathlib.Path) -> pathlib.Path:
  """Where a run is: what others start from is cached."""
  return root / case if (root / case).exists() else next((root / 'stages').glob(f'{case}-*'))


@pytest.fixture(scope='module')
def two(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """PPO and what it starts from, in two processes; `../writes.1` is what the second one wrote."""
  folder = tmp_path_factory.mktemp('two') / 'runs'
  record = {pair.RECORD: str(folder.parent / 'writes.{number}'), pair.FOLDER: str(folder)}
  program = Pair('train', config_flag('ppo'), f'--workdir={folder / "ppo"}', environment=record)
  codes, said = program.end()
  assert codes == [0, 0], said
  assert 'ppo: done' in said[0] and 'ppo 4/4' in said[0]
  # Of the second there are only lines of the library that connects them.
  assert 'ppo' not in said[1] and 'steps/s' not in said[1]
  return folder


def params_of(run: Run) -> dict[str, Any]:
  """All final parameters, on the devices of this process, whoever wrote them."""
  mesh, model = make_mesh(MeshConfig()), run.model
  name = run.config.objective.__class__.__name__
  if name == 'RewardModelConfig':
    abstract = {'reward_model': abstract_reward_model(model, mesh)}
  else:
    abstract = {'policy': abstract_decoder(model, mesh)}
  if name == 'PPOConfig':
    abstract['value_head'] = abstract_head(model, mesh)
  return trees.flatten({role: run.restore_role(role, tree) for role, tree in abstract.items()})


def check_equal(found: pathlib.Path, expected: pathlib.Path) -> None:
  """Parameters, metrics and evaluations of two runs, to float error."""
  runs = [Run(found), Run(expected)]
  params = [jax.device_get(params_of(run)) for run in runs]
  assert params[0].keys() == params[1].keys()
  # An update of Adam may turn rounding into a difference of up to some 1e-3 learning rates.
  for name, array in params[1].items():
    np.testing.assert_allclose(params[0][name], array, rtol=0, atol=5e-5, err_msg=name)
  for name in ('metrics.jsonl', 'evaluations.jsonl'):
    rows = [read_rows(run.folder / name) for run in runs]
    assert len(rows[0]) == len(rows[1]) > 0
    for row, other in zip(*rows, strict=True):
      assert row.pop('seconds') >= 0 and other.pop('seconds') >= 0
      assert row == pytest.approx(other, rel=1e-4, abs=1e-5), name
  for step in runs[1].folder.glob('evaluations/*.npz'):
    with np.load(step) as wanted, np.load(found / 'evaluations' / step.name) as arrays:
      for name, array in wanted.items():
        if array.dtype.kind == 'f':
          np.testing.assert_allclose(arrays[name], array, rtol=1e-4, atol=1e-5, err_msg=name)
        else:
          np.testing.assert_array_equal(arrays[name], array, err_msg=name)


@pytest.mark.parametrize('case', ['sft', 'reward_model', 'brief_dpo', 'ppo'])
def test_two_processes_equal_one(case: str, one: pathlib.Path, two: pathlib.Path) -> None:
  """Samples, scores and whitening across processes included."""
  check_equal(folder_of(case, two), folder_of(case, one))


def test_adapters_on_a_folder_in_two_processes_equal_one(
  one: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """Each loads its parts of the base, and writes those of the matrices; merged, they are equal."""
  parent = Run(folder_of('sft', one))
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  params = parent.restore_role('policy', abstract_decoder(parent.model, mesh))
  assets = hf_export.Assets(parent.folder / 'tokenizer')
  hf_export.export_policy(tmp_path / 'policy', parent.model, params, assets)
  start = f'--config.policy.init={tmp_path / "policy"}'
  program = Pair('train', config_flag('lora'), start, f'--workdir={tmp_path / "two"}')
  config = pair.get_config('lora')
  config.policy.init = str(tmp_path / 'policy')
  stages.run_stage(config, tmp_path / 'one', root=tmp_path)
  codes, said = program.end()
  assert codes == [0, 0], said
  check_equal(tmp_path / 'two', tmp_path / 'one')
  # B has left zero: what was compared is not the base alone.
  trained = [Run(tmp_path / name).restore_adapter(mesh) for name in ('one', 'two')]
  for leaf in jax.tree.leaves(trained):
    assert np.abs(leaf).max() > 1e-4


def test_only_the_first_process_writes(two: pathlib.Path) -> None:
  """Beside its own part of checkpoints, the second one changes nothing below the run directory."""
  assert f'{two}/ppo/config.json.tmp' in (two.parent / 'writes.0').read_text()
  written = [line.split(maxsplit=1) for line in (two.parent / 'writes.1').read_text().splitlines()]
  assert written, 'checkpoints at least'
  others = [path for _, path in written if '/checkpoints' not in path]
  assert not others
  record = json.loads((two / 'ppo' / 'record.json').read_text())
  assert len(record['devices']) == 8


def test_a_signal_to_one_process_stops_both_and_the_run_goes_on_in_one(
  one: pathlib.Path, two: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """SIGTERM at the second process: both save the same step; one process then ends it as ever.

  That two go on together is in tests/faults.
  """
  start = f'--config.policy.init={folder_of("sft", two)}'
  program = Pair('train', config_flag('dpo'), start, f'--workdir={two / "dpo"}')
  metrics = two / 'dpo' / 'metrics.jsonl'
  deadline = time.monotonic() + TIMEOUT
  while not metrics.exists() or not metrics.read_text():
    assert time.monotonic() < deadline and program.processes[0].poll() is None, program.end()
    time.sleep(0.02)
  program.processes[1].send_signal(signal.SIGTERM)
  codes, said = program.end()
  assert codes == [75, 75], said
  assert 'run the same command again' in said[0] and 'Traceback' not in said[0] + said[1]
  assert not (two / 'dpo' / 'result.json').exists()
  (step,) = (int(path.name) for path in (two / 'dpo' / 'checkpoints').iterdir())
  assert 1 <= step < pair.DPO_STEPS
  config = pair.get_config('dpo')
  config.policy.init = str(folder_of('sft', two))
  stages.run_stage(config, two / 'dpo', root=two)
  assert f'going on from step {step}' in capsys.readouterr().out
  check_equal(two / 'dpo', one / 'dpo')


def test_what_is_wrong_in_one_process_ends_both(tmp_path: pathlib.Path) -> None:
  """The second has another seed: one message, exit code 1, and nobody waits for the other."""
  flags = (config_flag('sft'), f'--workdir={tmp_path / "run"}')
  codes, said = Pair('train', *flags, own=((), ('--config.seed=1',))).end()
  assert codes == [1, 1], said
  assert said[0].count('error: ') == 1 and 'differ from those of process 0' in said[0]
  assert 'Traceback' not in said[0] + said[1] and 'error: ' not in said[1]
  assert not (tmp_path / 'run').exists()
