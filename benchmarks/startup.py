"""Times how long it takes from nothing to the first finished step, ours and a peer's."""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.measuring import Load, alternate, peak_bytes
from benchmarks.peer import Peer, Start


class Watched:
  """Starts a program time and again, until its first step is done."""

  def __init__(self) -> None:
    self.peak_bytes: int | None = None
    self.loaded: dict[str, Any] = {}
    self.title = ''

  def seconds(self, start: Start) -> float:
    """From the start of a program to the end of its first step."""
    began = time.perf_counter()
    with start() as program:
      self.loaded = program.loaded()
      program.step()
      seconds = time.perf_counter() - began
      self.title = program.title
      peak = program.peak_bytes
    if peak is not None:
      self.peak_bytes = max(peak, self.peak_bytes or 0)
    return seconds


def measure(
  ours: Callable[[str], Sequence[str]], repeats: int, start: Start | None
) -> dict[str, Any]:
  """The numbers of `compile`: 'cold', without compiled programs to read, and 'warm', with them.

  Every program is started once before, so that all files have been read.

  Args:
    ours: the command of our program, given a folder for compiled programs.
    repeats: how often each is started.
    start: starts the peer, which compiles nothing: both parts are held against the same start.
  """
  our, their = Watched(), Watched()

  def step() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
      command = ours(folder)
      parts = ('cold', 'warm')
      return {part: our.seconds(lambda: Peer(command, ' '.join(command))) for part in parts}

  def peer() -> dict[str, float]:
    assert start is not None
    return dict.fromkeys(('cold', 'warm'), their.seconds(start))

  first = step()
  told: dict[str, Any] | None = None if start is None else {'first_seconds': peer()}
  load = Load()
  rounds = alternate(step, None if start is None else peer, repeats)
  others = load.others()
  if told is not None:
    told |= {'name': their.title, 'loaded': their.loaded, 'peak_bytes': their.peak_bytes}
  return {
    'seconds': rounds.summary(),
    'first_seconds': first,
    'others': others,
    'peak_bytes': {**peak_bytes(), 'host': our.peak_bytes},
    'peer': told,
  }


def command(size: str, dtype: str, folder: str) -> Callable[[str], Sequence[str]]:
  """The command of `benchmarks.first_step`, given a folder for compiled programs."""
  start = [sys.executable, '-m', 'benchmarks.first_step']
  flags = [f'--size={size}', f'--dtype={dtype}', f'--folder={folder}']
  return lambda cache: [*start, *flags, f'--cache_dir={cache}']
