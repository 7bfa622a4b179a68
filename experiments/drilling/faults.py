"""The drills: what happens to a run, again and again, and how it must be borne."""

import dataclasses
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from experiments.drilling.bits import differences
from experiments.drilling.program import Program, Running, free_port

STOPPED = 75
# What a program says of storage, and of a checkpoint, that failed it.
_COMPLAINT = 'error: '
# How long a program may take to notice that another of its processes is gone.
_NOTICED_SECONDS = 300.0


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

  def saving(self, workdir: pathlib.Path) -> bool:
    """Whether a checkpoint is being written."""
    return any('tmp' in name for run in _runs(workdir) for name in _names(run / 'checkpoints'))

  def logged(self, workdir: pathlib.Path) -> int:
    """Bytes of metrics, which grow while a run trains."""
    files = [run / 'metrics.jsonl' for run in _runs(workdir)]
    return sum(file.stat().st_size for file in files if file.exists())


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


Disturb = Callable[[Ground, Running, pathlib.Path], bool]


def disturbed(
  ground: Ground, name: str, trials: int, disturb: Disturb, allowed: tuple[int, ...]
) -> Outcome:
  """Starts runs and disturbs them until that has happened `trials` times; each is led to its end.

  Args:
    ground: where.
    name: the drill's.
    trials: how many disturbances.
    disturb: does it; whether it came before the program was over.
    allowed: exit codes of a disturbed program.
  """
  outcome = Outcome()
  for workdir in laps(ground, name):
    while outcome.trials < trials:
      running = ground.program.start(workdir)
      came = disturb(ground, running, workdir)
      code = running.end()
      if not came:
        if code:
          raise BrokenError(f'exit code {code}: {last_words(running)}')
        break
      outcome.trials += 1
      if code not in (0, *allowed):
        raise BrokenError(f'exit code {code} after {outcome.trials} trials: {last_words(running)}')
      outcome.survived += 1
    finish(ground, workdir, outcome)
    if outcome.trials >= trials:
      return outcome
  raise AssertionError('there are always more laps')


def _kill(ground: Ground, running: Running, workdir: pathlib.Path) -> bool:
  """SIGKILL at a random moment: half of them over the whole time, half while it trains."""
  if ground.chance.random() < 0.5:
    moment = running.began + ground.moment()
    came = running.wait_until(lambda: time.monotonic() >= moment)
  else:
    before = ground.logged(workdir)
    came = running.wait_until(lambda: ground.logged(workdir) > before)
    moment = time.monotonic() + ground.chance.expovariate(4 / ground.seconds)
    came = came and running.wait_until(lambda: time.monotonic() >= moment)
  running.signal(signal.SIGKILL)
  return came


def _kill_saving(ground: Ground, running: Running, workdir: pathlib.Path) -> bool:
  """SIGKILL while a checkpoint is being written."""
  # What a killed one has left is cleaned up first.
  running.wait_until(lambda: not ground.saving(workdir))
  came = running.wait_until(lambda: ground.saving(workdir))
  time.sleep(ground.chance.uniform(0, 0.05))
  running.signal(signal.SIGKILL)
  return came


def _terminate(ground: Ground, running: Running, workdir: pathlib.Path) -> bool:
  """SIGTERM or SIGINT at a random moment once it is up."""
  moment = running.began + ground.moment()
  came = running.wait_until(lambda: bool(running.said) and time.monotonic() >= moment)
  running.signal(ground.chance.choice([signal.SIGTERM, signal.SIGINT]))
  return came


def _interrupt_twice(ground: Ground, running: Running, workdir: pathlib.Path) -> bool:
  """SIGINT while it trains, and again before it can have stopped: it ends at once."""
  before = ground.logged(workdir)
  came = running.wait_until(lambda: ground.logged(workdir) > before)
  running.signal(signal.SIGINT)
  time.sleep(ground.chance.uniform(0, 0.02))
  running.signal(signal.SIGINT)
  return came


def kill(ground: Ground, trials: int) -> Outcome:
  """kill -9 at random moments."""
  return disturbed(ground, 'kill', trials, _kill, (-signal.SIGKILL,))


def kill_saving(ground: Ground, trials: int) -> Outcome:
  """kill -9 while a checkpoint is being written."""
  return disturbed(ground, 'kill_saving', trials, _kill_saving, (-signal.SIGKILL,))


def terminate(ground: Ground, trials: int) -> Outcome:
  """SIGTERM or SIGINT: the step is finished and saved, exit code 75."""
  return disturbed(ground, 'terminate', trials, _terminate, (STOPPED,))


def interrupt_twice(ground: Ground, trials: int) -> Outcome:
  """A second signal: it ends at once."""
  codes = (STOPPED, -signal.SIGINT, 128 + signal.SIGINT)
  return disturbed(ground, 'interrupt_twice', trials, _interrupt_twice, codes)


def clock(ground: Ground, trials: int) -> Outcome:
  """The clock of the day jumps by days, forwards and back, all the time, and a kill in between.

  Waiting for a checkpoint may then be given up too early, which is said; the next start goes on.
  """
  outcome = Outcome()
  gave_up = 0
  module = [sys.executable, '-m', 'experiments.drilling.clock']

  def start(workdir: pathlib.Path) -> Running:
    # `python -m experiments.train ...`, by the module that changes the clock.
    return ground.program.start(workdir, through=lambda command: [*module, *command[2:]])

  for workdir, _ in zip(laps(ground, 'clock'), range(trials), strict=False):
    _kill(ground, start(workdir), workdir)
    while code := (running := start(workdir)).end():
      gave_up += 1
      if code != 1 or not clear(running) or gave_up > 10 * trials:
        raise BrokenError(f'exit code {code}: {last_words(running)}')
    outcome.trials += 1
    outcome.survived += 1
    compare(ground, workdir, outcome)
  if gave_up:
    outcome.notes.append(f'{gave_up} times a start ended with an error that told to run it again')
  return outcome


def damage(ground: Ground, trials: int) -> Outcome:
  """A file of the last checkpoint is cut short, changed by a bit, or gone."""
  outcome = Outcome()
  refused = fell_back = 0
  for workdir in laps(ground, 'damage'):
    running = ground.program.start(workdir)
    came = running.wait_until(lambda folder=workdir: len(ground.checkpoints(folder)) > 1)
    running.signal(signal.SIGKILL)
    found = ground.checkpoints(workdir)
    if not came or not found:
      raise BrokenError(f'it never has two checkpoints to go on from: {last_words(running)}')
    outcome.trials += 1
    what = _damage(ground.chance, found[0])
    again = ground.program.start(workdir)
    code = again.end()
    if code == 0:
      outcome.survived += 1
      fell_back += 'falling back to step' in again.said
      compare(ground, workdir, outcome)
    elif code == 1 and 'damaged' in again.said:
      outcome.survived += 1
      refused += 1
    else:
      raise BrokenError(f'{what}: exit code {code}: {last_words(again)}')
    if outcome.trials >= trials:
      outcome.notes.append(f'{fell_back} fell back to the step before, {refused} refused')
      return outcome
  raise AssertionError('there are always more laps')


def _damage(chance: random.Random, checkpoint: pathlib.Path) -> str:
  files = sorted(path for path in checkpoint.rglob('*') if path.is_file() and path.stat().st_size)
  path, kind = chance.choice(files), chance.choice(['cut', 'flip', 'delete'])
  content = bytearray(path.read_bytes())
  if kind == 'delete':
    path.unlink()
  elif kind == 'cut':
    path.write_bytes(content[: chance.randrange(len(content))])
  else:
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
  return f'{kind} {path}'


def storage_faults() -> bool:
  """Whether this machine lets a user mount file systems of his own, which `full` needs."""
  if shutil.which('unshare') is None:
    return False
  probe = ['unshare', '-rm', 'sh', '-c', 'mount -t tmpfs -o size=64k tmpfs /mnt']
  return subprocess.run(probe, capture_output=True).returncode == 0


def full(ground: Ground, trials: int) -> Outcome:
  """The disk is full during a save: it says so and ends; with room again it goes on."""
  script = (
    'mount -t tmpfs -o size=$1 tmpfs "$2" && shift && folder="$1" && shift && ("$@"; '
    'echo $? > "$folder.codes"; mount -o remount,size=100% "$folder"; "$@"; '
    'echo $? >> "$folder.codes"; cp -a "$folder/." "$folder.kept")'
  )
  return _mounted(ground, 'full', trials, script, lambda size: ground.chance.uniform(0.3, 1) * size)


def read_only(ground: Ground, trials: int) -> Outcome:
  """The run directory cannot be written to: it says so and ends; later it goes on."""
  script = (
    'mount -t tmpfs -o size=100% tmpfs "$2" && shift && folder="$1" && shift && ('
    'timeout -s KILL $KILLED "$@"; mount -o remount,ro "$folder"; "$@"; '
    'echo $? > "$folder.codes"; mount -o remount,rw "$folder"; "$@"; '
    'echo $? >> "$folder.codes"; cp -a "$folder/." "$folder.kept")'
  )
  return _mounted(ground, 'read_only', trials, script, lambda size: size)


def _mounted(
  ground: Ground, name: str, trials: int, script: str, room: Callable[[int], float]
) -> Outcome:
  """Runs in a file system of its own; the first exit code may be an error, the second may not."""
  outcome = Outcome()
  size = sum(path.stat().st_size for path in ground.undisturbed.rglob('*') if path.is_file())
  for workdir, _ in zip(laps(ground, name), range(trials), strict=False):
    for suffix in ('.codes', '.kept'):
      _remove(workdir.with_name(workdir.name + suffix))
    workdir.mkdir(parents=True)
    settings = [f'{int(room(size))}', str(workdir)]
    killed = f'KILLED={ground.moment():.1f}'
    running = ground.program.start(
      workdir,
      through=lambda command, settings=settings, killed=killed: [
        *('env', killed, 'unshare', '-rm', 'sh', '-c', script, 'sh'),
        *settings,
        *command,
      ],
    )
    running.end()
    codes = workdir.with_name(workdir.name + '.codes').read_text().split()
    outcome.trials += 1
    if codes[-1] != '0' or not (codes[0] == '0' or clear(running)):
      raise BrokenError(f'exit codes {codes}: {last_words(running)}')
    outcome.survived += 1
    workdir.rmdir()
    workdir.with_name(workdir.name + '.kept').rename(workdir)
    compare(ground, workdir, outcome)
  return outcome


def _remove(path: pathlib.Path) -> None:
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def process(ground: Ground, trials: int) -> Outcome:
  """One of two processes is killed: the other ends too, and both go on together."""
  program = dataclasses.replace(
    ground.program, environment=(*ground.program.environment, ('JAX_NUM_CPU_DEVICES', '1'))
  )

  def pair(workdir: pathlib.Path) -> list[Running]:
    port = free_port()
    return [
      program.start(
        workdir,
        more=(
          f'--coordinator_address=localhost:{port}',
          '--num_processes=2',
          f'--process_id={number}',
        ),
      )
      for number in range(2)
    ]

  def end(runnings: list[Running]) -> None:
    for running in runnings:
      if code := running.end():
        raise BrokenError(f'exit code {code}: {last_words(running)}')

  alone = ground.folder / 'process_undisturbed'
  shutil.rmtree(alone, ignore_errors=True)
  end(pair(alone))
  ground = dataclasses.replace(ground, undisturbed=alone)
  outcome = Outcome()
  for workdir, _ in zip(laps(ground, 'process'), range(trials), strict=False):
    runnings = pair(workdir)
    before = ground.logged(workdir)
    victim = ground.chance.randrange(2)
    came = runnings[victim].wait_until(
      lambda folder=workdir, before=before: ground.logged(folder) > before
    )
    runnings[victim].signal(signal.SIGKILL)
    code = runnings[1 - victim].end(_NOTICED_SECONDS)
    outcome.trials += 1
    if came and code == 0:
      raise BrokenError(f'the other process went on alone: {last_words(runnings[1 - victim])}')
    end(pair(workdir))
    outcome.survived += 1
    compare(ground, workdir, outcome)
  return outcome


DRILLS: dict[str, Callable[[Ground, int], Outcome]] = {
  'kill': kill,
  'kill_saving': kill_saving,
  'terminate': terminate,
  'interrupt_twice': interrupt_twice,
  'damage': damage,
  'full': full,
  'read_only': read_only,
  'clock': clock,
  'process': process,
}
# Drills that mount file systems.
MOUNTING = ('full', 'read_only')
