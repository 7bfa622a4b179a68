"""Whatever happens to a run, the same command ends with the same bits; the drills at small size.

At full size: `python -m tests.faults.full` (docs/reliability.md has its table).
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from experiments.drilling.drills import DRILLS, MOUNTING
from experiments.drilling.ground import Ground, Outcome, prepare
from experiments.drilling.program import Program
from experiments.drilling.storage import storage_faults
from tests.experiments.programs import ROOT
from tests.faults import stages

pytestmark = pytest.mark.slow

# How often, in one run of the tests. The study has all kinds of stages in it.
TRIALS = {
  ('sft', 'kill'): 1,
  ('sft', 'kill_saving'): 1,
  ('sft', 'terminate'): 1,
  ('sft', 'interrupt_twice'): 1,
  ('sft', 'damage'): 1,
  ('sft', 'full'): 1,
  ('sft', 'read_only'): 1,
  ('sft', 'clock'): 1,
  ('sft', 'process'): 1,
  ('compare', 'kill'): 1,
}


def program(case: str, folder: pathlib.Path) -> Program:
  """The program that runs a case, with what it shares with others below a folder."""
  flags = (
    f'--config={stages.HERE}:{case}',
    f'--cache_dir={os.environ["JAX_COMPILATION_CACHE_DIR"]}',
  )
  environment = (('PYTHONPATH', str(ROOT)),)
  if case == 'compare':
    return Program('compare', flags, environment)
  return Program('train', (*flags, f'--root={folder}'), environment)


@pytest.fixture(scope='module')
def grounds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ground]:
  """By case, the run that nothing happens to; made when it is asked for."""
  folder = tmp_path_factory.mktemp('drills')

  class Grounds(dict[str, Ground]):
    def __missing__(self, case: str) -> Ground:
      (folder / case).mkdir()
      self[case] = prepare(program(case, folder), folder / case, seed=len(self))
      return self[case]

  return Grounds()


@pytest.mark.parametrize(('case', 'drill'), TRIALS)
def test_a_run_ends_with_the_same_bits(case: str, drill: str, grounds: dict[str, Ground]) -> None:
  """Parameters, metrics, evaluations and reports; none is missing, and none is there twice."""
  if drill in MOUNTING and not storage_faults():
    pytest.skip('needs file systems of its own, which `unshare -rm` does not give here')
  outcome = Outcome()
  DRILLS[drill](grounds[case], TRIALS[case, drill], outcome)
  assert outcome.trials == outcome.survived == TRIALS[case, drill]
  assert outcome.equal == outcome.finished, outcome.notes
  assert outcome.finished >= 1 or 'refused' in outcome.notes[-1]


def drill(*flags: str) -> subprocess.CompletedProcess[str]:
  command = [sys.executable, '-m', 'experiments.drill', *flags]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (('--drills=kill,flood',), '--drills=flood: expected some of kill, '),
    (('--drills=kill', '--config.steps=0'), 'undisturbed, it fails: .*steps=0'),
    (('--trials=0',), 'trials'),
  ],
)
def test_what_is_wrong_is_named(
  flags: tuple[str, ...], message: str, tmp_path: pathlib.Path
) -> None:
  done = drill(f'--config={stages.HERE}:sft', f'--workdir={tmp_path}', *flags)
  assert done.returncode == 1
  assert 'Traceback' not in done.stderr
  assert re.search(message, done.stderr), done.stderr
