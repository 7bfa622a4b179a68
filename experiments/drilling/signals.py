"""Drills from outside: kills, signals, another clock, one of two processes that dies."""

import dataclasses
import functools
import pathlib
import shutil
import signal
import sys
import time
from collections.abc import Callable

from experiments.drilling.ground import (
  BrokenError,
  Ground,
  Outcome,
  clear,
  compare,
  finish,
  laps,
  last_words,
)
from experiments.drilling.program import Running, free_port

STOPPED = 75
# How long a program may take to notice that another of its processes is gone.
_NOTICED_SECONDS = 300.0

# How often in a row a program may be over before it can be disturbed.
_MISSED = 20

Disturb = Callable[[Ground, Running, pathlib.Path], bool]


def disturbed(
  ground: Ground,
  outcome: Outcome,
  name: str,
  trials: int,
  disturb: Disturb,
  allowed: tuple[int, ...],
) -> None:
  """Starts runs and disturbs them until that has happened `trials` times; each is led to its end.

  Args:
    ground: where.
    outcome: what is counted.
    name: the drill's.
    trials: how many disturbances.
    disturb: does it; whether it came before the program was over.
    allowed: exit codes of a disturbed program.
  """
  missed = 0
  for workdir in laps(ground, name):
    while outcome.trials < trials:
      running = ground.program.start(workdir)
      came = disturb(ground, running, workdir)
      code = running.end()
      if not came and code:
        raise BrokenError(f'exit code {code}: {last_words(running)}')
      if code == 0:  # it was over first, if only just
        ground.seconds = time.monotonic() - running.began  # it has become quicker
        missed += 1
        break
      missed = 0
      outcome.trials += 1
      if code not in allowed:
        raise BrokenError(f'exit code {code} after {outcome.trials} trials: {last_words(running)}')
      if code == STOPPED and (lost := ground.lost(workdir)):
        raise BrokenError(f'it stopped by itself, and yet lost steps: {lost} ({running.log})')
      outcome.survived += 1
    finish(ground, workdir, outcome)
    if outcome.trials >= trials:
      return
    if missed > _MISSED:
      raise BrokenError(f'it ended {missed} times in a row as if nothing had happened to it')
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
  """SIGKILL up to 50 ms after a checkpoint is seen being written."""
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
  """SIGINT while it trains, and again before it can have stopped."""
  before = ground.logged(workdir)
  came = running.wait_until(lambda: ground.logged(workdir) > before)
  running.signal(signal.SIGINT)
  time.sleep(ground.chance.uniform(0, 0.02))
  running.signal(signal.SIGINT)
  return came


def kill(ground: Ground, trials: int, outcome: Outcome) -> None:
  """kill -9 at random moments."""
  disturbed(ground, outcome, 'kill', trials, _kill, (-signal.SIGKILL,))


def kill_saving(ground: Ground, trials: int, outcome: Outcome) -> None:
  """kill -9 up to 50 ms after a checkpoint was seen being written."""
  disturbed(ground, outcome, 'kill_saving', trials, _kill_saving, (-signal.SIGKILL,))


def terminate(ground: Ground, trials: int, outcome: Outcome) -> None:
  """SIGTERM or SIGINT: the step is finished and saved, exit code 75."""
  disturbed(ground, outcome, 'terminate', trials, _terminate, (STOPPED,))


def interrupt_twice(ground: Ground, trials: int, outcome: Outcome) -> None:
  """A second signal: what was complete is saved, exit code 75."""
  disturbed(ground, outcome, 'interrupt_twice', trials, _interrupt_twice, (STOPPED,))


def clock(ground: Ground, trials: int, outcome: Outcome) -> None:
  """The clock of the day jumps by days, forwards and back, all the time, and a kill in between.

  Waiting for a checkpoint may then be given up too early, which is said; the next start goes on.
  """
  gave_up = 0

  def start(workdir: pathlib.Path) -> Running:
    module = (sys.executable, '-m', 'experiments.drilling.clock')
    return ground.program.start(workdir, through=module)

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


def process(ground: Ground, trials: int, outcome: Outcome) -> None:
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
  for workdir, _ in zip(laps(ground, 'process'), range(trials), strict=False):
    runnings = pair(workdir)
    victim, other = ground.chance.sample(runnings, 2)
    came = victim.wait_until(functools.partial(ground.training, workdir))
    victim.signal(signal.SIGKILL)
    if not came:
      raise BrokenError(f'it was over before it could be killed: {last_words(victim)}')
    code = other.end(_NOTICED_SECONDS)
    outcome.trials += 1
    if code == 0:
      raise BrokenError(f'the other process went on alone: {last_words(other)}')
    end(pair(workdir))
    outcome.survived += 1
    compare(ground, workdir, outcome)
