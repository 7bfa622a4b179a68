"""Drills of storage: damaged checkpoints, a full disk, a folder that cannot be written to."""

import functools
import pathlib
import random
import shutil
import signal
import subprocess
from collections.abc import Callable

from experiments.drilling.ground import (
  BrokenError,
  Ground,
  Outcome,
  clear,
  compare,
  laps,
  last_words,
)


def damage(ground: Ground, trials: int, outcome: Outcome) -> None:
  """A file of the last checkpoint is cut short, changed by a bit, or gone."""
  refused = fell_back = 0
  for workdir in laps(ground, 'damage'):
    running = ground.program.start(workdir)
    came = running.wait_until(functools.partial(ground.can_fall_back, workdir))
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
    elif code == 1 and 'damaged' in again.said and clear(again):
      outcome.survived += 1
      refused += 1
    else:
      raise BrokenError(f'{what}: exit code {code}: {last_words(again)}')
    if outcome.trials >= trials:
      outcome.notes.append(f'{fell_back} fell back to the step before, {refused} refused')
      return
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


def full(ground: Ground, trials: int, outcome: Outcome) -> None:
  """The disk is full during a save: it says so and ends; with room again it goes on."""
  script = (
    'mount -t tmpfs -o size=$1 tmpfs "$2" && shift && folder="$1" && shift && ("$@"; '
    'echo $? > "$folder.codes"; mount -o remount,size=100% "$folder"; "$@"; '
    'echo $? >> "$folder.codes"; cp -a "$folder/." "$folder.kept")'
  )
  _mounted(
    ground, outcome, 'full', trials, script, lambda size: ground.chance.uniform(0.3, 1) * size
  )


def read_only(ground: Ground, trials: int, outcome: Outcome) -> None:
  """The run directory cannot be written to: it says so and ends; later it goes on."""
  script = (
    'mount -t tmpfs -o size=100% tmpfs "$2" && shift && folder="$1" && shift && ('
    'timeout -s KILL $KILLED "$@"; mount -o remount,ro "$folder"; "$@"; '
    'echo $? > "$folder.codes"; mount -o remount,rw "$folder"; "$@"; '
    'echo $? >> "$folder.codes"; cp -a "$folder/." "$folder.kept")'
  )
  _mounted(ground, outcome, 'read_only', trials, script, lambda size: size)


def _mounted(
  ground: Ground,
  outcome: Outcome,
  name: str,
  trials: int,
  script: str,
  room: Callable[[int], float],
) -> None:
  """Runs in a file system of its own: first it must fail and say why, then it must go on.

  Where the fault found nothing to fail, as what was to be written fitted, it was no trial.
  """
  size = sum(path.stat().st_size for path in ground.undisturbed.rglob('*') if path.is_file())
  missed = 0
  for workdir in laps(ground, name):
    for suffix in ('.codes', '.kept'):
      _remove(workdir.with_name(workdir.name + suffix))
    workdir.mkdir(parents=True)
    before = ('env', f'KILLED={ground.moment():.1f}', 'unshare', '-rm', 'sh', '-c', script, 'sh')
    settings = (f'{int(room(size))}', str(workdir))
    running = ground.program.start(workdir, through=(*before, *settings))
    running.end()
    failed, again = workdir.with_name(workdir.name + '.codes').read_text().split()
    happened = failed != '0'
    outcome.trials += happened
    if again != '0' or (happened and not clear(running)):
      raise BrokenError(f'exit codes {failed} and {again}: {last_words(running)}')
    outcome.survived += happened
    missed += not happened
    workdir.rmdir()
    workdir.with_name(workdir.name + '.kept').rename(workdir)
    compare(ground, workdir, outcome)
    if outcome.trials >= trials:
      break
    if missed > 5 * trials:
      raise BrokenError(f'in {missed} runs the fault found nothing to fail')
  if missed:
    outcome.notes.append(f'in {missed} further runs the fault found nothing to fail')


def _remove(path: pathlib.Path) -> None:
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
