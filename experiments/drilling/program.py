"""A training program as a user starts it: in a process of its own, to be disturbed from outside."""

import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

# How long a program that should end by itself may take.
PATIENCE = 1800.0
_POLL = 0.002


@dataclasses.dataclass(frozen=True)
class Program:
  """`python -m experiments.NAME FLAGS --workdir=...`.

  Attributes:
    name: 'train' or 'compare'.
    flags: the config and its fields, and where stages are shared.
    environment: beside that of this process.
  """

  name: str
  flags: tuple[str, ...]
  environment: tuple[tuple[str, str], ...] = ()

  def command(self, workdir: pathlib.Path) -> list[str]:
    module = ('-m', f'experiments.{self.name}')
    return [sys.executable, *module, *self.flags, f'--workdir={workdir}']

  def start(
    self,
    workdir: pathlib.Path,
    *,
    through: Sequence[str] = (),
    more: Sequence[str] = (),
  ) -> 'Running':
    """Starts it, by the command `through` if it is given; `more` are further flags."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    log = workdir.with_name(workdir.name + '.log')
    with log.open('ab') as file:
      position = file.tell()
      process = subprocess.Popen(
        [*through, *self.command(workdir), *more],
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=subprocess.STDOUT,
        env={**os.environ, **dict(self.environment)},
        start_new_session=True,
      )
    return Running(process, log, position, time.monotonic())


@dataclasses.dataclass(frozen=True)
class Running:
  """A started program.

  Attributes:
    process: its process, the leader of a group of its own.
    log: what it and those before it in its folder said.
    position: where in the log its own part begins.
    began: on the monotonic clock, seconds.
  """

  process: subprocess.Popen
  log: pathlib.Path
  position: int
  began: float

  @property
  def over(self) -> bool:
    return self.process.poll() is not None

  @property
  def said(self) -> str:
    return self.log.read_bytes()[self.position :].decode('utf-8', 'replace')

  def wait_until(self, happened: Callable[[], bool], patience: float = PATIENCE) -> bool:
    """Whether something happened before the program was over; raises TimeoutError if neither."""
    deadline = time.monotonic() + patience
    while not self.over:
      if happened():
        return True
      if time.monotonic() > deadline:
        self.signal(signal.SIGKILL)
        raise TimeoutError(f'{self.log}: nothing came of it in {patience:.0f} s')
      time.sleep(_POLL)
    return False

  def signal(self, number: int) -> None:
    """Sends a signal to the program (SIGKILL: to all its processes), if it still runs."""
    try:
      if number == signal.SIGKILL:
        os.killpg(self.process.pid, number)
        self.process.wait()
      else:
        self.process.send_signal(number)
    except ProcessLookupError:
      pass

  def end(self, patience: float = PATIENCE) -> int:
    """The exit code, once it is over by itself; raises TimeoutError if that takes too long."""
    try:
      return self.process.wait(patience)
    except subprocess.TimeoutExpired:
      self.signal(signal.SIGKILL)
      raise TimeoutError(f'{self.log}: not over after {patience:.0f} s') from None


def free_port() -> int:
  """A port of this machine that nobody listens to."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    return free.getsockname()[1]
