"""Where drills take place, what they count, and how a run is held against the undisturbed one."""

import dataclasses
import os
import pathlib
import random
import shutil
import time
from collections.abc import Iterator

from experiments.drilling.bits import differences
from experiments.drilling.program import Program, Running
from rlhf_jax.common.errors import UserError
from rlhf_jax.training.writers import read_rows

# What a program says of what went wrong, in a line.
_COMPLAINT = 'error: '


class BrokenError(Exception):
  """A run that did not bear what happened to it; says what it did instead."""


@dataclasses.dataclass
class Outcome:
  """What became of a drill.

  Attributes:
    trials: how often the fault happened.
    survived: how often the same command went on afterwards, or refused and named what is damaged.
    finished: runs that were led to their end through the faults.
    equal: those of them with the same bits as the undisturbed run.
    notes: what went wrong, or is to be said.
  """

  trials: int = 0
  survived: int = 0
  finished: int = 0
  equal: int = 0
  notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Ground:
  """Where drills take place.

  Attributes:
    program: what is run.
    folder: of all drills.
    undisturbed: the finished run to compare with.
    seconds: how long that took, with programs compiled.
    chance: draws moments and places.
  """

  program: Program
  folder: pathlib.Path
  undisturbed: pathlib.Path
  seconds: float
  chance: random.Random

  def moment(self) -> float:
    """Seconds from a program's start, over the whole of what it may take."""
    return self.chance.uniform(0, self.seconds)

  def checkpoints(self, workdir: pathlib.Path) -> list[pathlib.Path]:
    """The finished checkpoints of the run that is under way, the last first."""
    found = [
      run / 'checkpoints' / name
      for run in _runs(workdir)
      if not (run / 'result.json').exists()
      for name in _names(run / 'checkpoints')
      if name.isdigit()
    ]
    return sorted(found, key=lambda path: int(path.name), reverse=True)

  def lost(self, workdir: pathlib.Path) -> str:
    """What was written of steps that no checkpoint of an unfinished run has; '' if all have one."""
    for run in _runs(workdir):
      if (run / 'result.json').exists() or not (run / 'metrics.jsonl').exists():
        continue
      rows = read_rows(run / 'metrics.jsonl')
      kept = [int(name) for name in _names(run / 'checkpoints') if name.isdigit()]
      if rows and rows[-1]['step'] > max(kept, default=0):
        return f'{run.name} has rows to step {rows[-1]["step"]} and checkpoints {sorted(kept)}'
    return ''

  def can_fall_back(self, workdir: pathlib.Path) -> bool:
    """Whether there is a checkpoint before the last one."""
    return len(self.checkpoints(workdir)) > 1

  def saving(self, workdir: pathlib.Path) -> bool:
    """Whether a checkpoint is being written."""
    return any('tmp' in name for run in _runs(workdir) for name in _names(run / 'checkpoints'))

  def logged(self, workdir: pathlib.Path) -> int:
    """Bytes of metrics, which grow while a run trains."""
    files = [run / 'metrics.jsonl' for run in _runs(workdir)]
    return sum(file.stat().st_size for file in files if file.exists())

  def training(self, workdir: pathlib.Path) -> bool:
    """Whether a fresh run has made its first steps."""
    return self.logged(workdir) > 0


def _names(folder: pathlib.Path) -> list[str]:
  """What is in a folder that may come and go meanwhile."""
  try:
    return os.listdir(folder)
  except (FileNotFoundError, NotADirectoryError):
    return []


def _runs(workdir: pathlib.Path) -> list[pathlib.Path]:
  """A stage's run directory, or those of a study's stages."""
  return [workdir, *(workdir / name for name in _names(workdir))]


def finish(ground: Ground, workdir: pathlib.Path, outcome: Outcome) -> None:
  """Lets the run end undisturbed, and compares it."""
  running = ground.program.start(workdir)
  code = running.end()
  if code:
    raise BrokenError(f'exit code {code}: {last_words(running)}')
  compare(ground, workdir, outcome)


def compare(ground: Ground, workdir: pathlib.Path, outcome: Outcome) -> None:
  """Notes how a finished run differs from the undisturbed one; one that is equal is deleted."""
  outcome.finished += 1
  lines = differences(workdir, ground.undisturbed)
  if not lines:
    outcome.equal += 1
    shutil.rmtree(workdir)
  outcome.notes += [f'{workdir.name}: {line}' for line in lines[:3]]


def last_words(running: Running) -> str:
  lines = [line for line in running.said.splitlines() if line.strip()]
  return f'{lines[-1] if lines else "nothing said"} ({running.log})'


def clear(running: Running) -> bool:
  """Whether a program that ended with an error said what was wrong, and no more."""
  return _COMPLAINT in running.said and 'Traceback' not in running.said


def laps(ground: Ground, name: str) -> Iterator[pathlib.Path]:
  """Fresh folders for one run after the other."""
  number = 0
  while True:
    workdir = ground.folder / f'{name}_{number}'
    shutil.rmtree(workdir, ignore_errors=True)
    yield workdir
    number += 1


def prepare(program: Program, folder: pathlib.Path, seed: int) -> Ground:
  """Runs a program undisturbed, twice: the second time what it compiles is there already.

  Raises UserError if it fails, or is not the same twice.
  """
  runs = [folder / 'undisturbed', folder / 'undisturbed_again']
  for run in runs:
    shutil.rmtree(run, ignore_errors=True)
    began = time.monotonic()
    running = program.start(run)
    if running.end():
      raise UserError(f'undisturbed, it fails: {last_words(running)}')
    seconds = time.monotonic() - began
    print(f'{run.name}: {seconds:.1f} s', flush=True)
  if lines := differences(runs[1], runs[0]):
    raise UserError(f'undisturbed, it is not the same twice, as drills need it: {lines[0]}')
  shutil.rmtree(runs[1])
  return Ground(program, folder, runs[0], seconds, random.Random(seed))
