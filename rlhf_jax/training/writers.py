"""Metric writers: JSON lines always, TensorBoard on request. Rows survive interruptions exactly."""

import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from rlhf_jax.common import files, processes
from rlhf_jax.common.errors import RunError

# How long rows may be unseen by a TensorBoard that watches.
_FLUSH_SECONDS = 30.0


class Writer(Protocol):
  """Where rows of numbers go."""

  def write(self, step: int, values: Mapping[str, Any]) -> None: ...

  def sync(self) -> None:
    """Has all rows on the disk: a checkpoint that is written after them must not outlive them."""

  def close(self) -> None: ...


class JsonlWriter:
  """One JSON object a line, `{"step": 10, "loss": ...}`, flushed at once."""

  def __init__(
    self,
    path: pathlib.Path,
    *,
    keep_through: int,
    stale: Callable[[Mapping[str, Any]], bool] = lambda row: False,
  ):
    """Opens `path` for appending, after dropping what lies beyond step `keep_through`.

    A run that is resumed from step 100 makes rows 101.. again: the old ones, and a last line that
    was cut short, must not stay beside them. A damaged line before the last is said to be lost.
    `stale` tells which rows of that step are made again too.
    """
    if path.exists():
      # What is no text is no row either; splitlines would take more than line ends for such.
      lines = path.read_text(encoding='utf-8', errors='replace').rstrip('\n').split('\n')
      kept = [
        line
        for line in lines
        if (step := _step_of(line)) <= keep_through
        and not (step == keep_through and stale(json.loads(line)))
      ]
      for number, line in enumerate(lines[:-1], 1):
        if keep_through >= 0 and _step_of(line) == math.inf:
          processes.say(f'warning: {path}:{number}: damaged: this row is lost ({line!r:.60})')
      files.write_text(path, ''.join(line + '\n' for line in kept))
    self._file = path.open('a', encoding='utf-8')

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    # JSON has no nan and no infinity.
    finite = {
      name: None if isinstance(value, float) and not math.isfinite(value) else value
      for name, value in values.items()
    }
    self._file.write(json.dumps({'step': step, **finite}) + '\n')
    self._file.flush()

  def sync(self) -> None:
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()


def _step_of(line: str) -> float:
  try:
    return float(json.loads(line)['step'])
  except (ValueError, KeyError, TypeError):
    return math.inf


class TensorBoardWriter:
  """TensorBoard event files through tensorboardX (no TensorFlow).

  Not by its SummaryWriter, whose flush leaves what is still in the queue of its thread.
  """

  def __init__(self, folder: pathlib.Path, *, keep_through: int):
    # Slow to import, and optional by config.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    folder.mkdir(exist_ok=True)
    # Two that are opened in the same second must not share a file.
    suffix = f'.{len(list(folder.iterdir())):04}'
    self._file = EventsWriter(str(folder / 'events'), suffix)
    # Hides events of steps that are made again after a resume: all that were read before it, so
    # that there is one file for all rows.
    start = SessionLog(status=SessionLog.START)
    self._file.write_event(Event(wall_time=time.time(), step=keep_through + 1, session_log=start))
    self._flushed = time.monotonic()

  def write(self, step: int, values: Mapping[str, Any], prefix: str = '') -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import scalar

    for name, value in values.items():
      if isinstance(value, int | float):
        summary = scalar(prefix + name, value)
        self._file.write_event(Event(wall_time=time.time(), step=step, summary=summary))
    if time.monotonic() > self._flushed + _FLUSH_SECONDS:
      self.sync()

  def sync(self) -> None:
    self._file.flush()
    self._flushed = time.monotonic()

  def close(self) -> None:
    self._file.close()


class PrefixedWriter:
  """Rows of another kind for the same TensorBoard files, under names of their own."""

  def __init__(self, writer: TensorBoardWriter, prefix: str):
    self._writer, self._prefix = writer, prefix

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    self._writer.write(step, values, self._prefix)

  def sync(self) -> None:
    """Nothing: the other writer does it for both."""

  def close(self) -> None:
    """Nothing: the other writer does it for both."""


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a JSONL file; none if it does not exist. Raises RunError for a damaged one."""
  if not path.exists():
    return []
  rows = []
  for number, line in enumerate(path.read_bytes().splitlines(), 1):
    try:
      rows.append(json.loads(line))
    except ValueError as error:
      raise RunError(f'{path}:{number}: damaged ({error}).') from error
  return rows
