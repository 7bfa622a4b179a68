"""Metric writers: JSON lines always, TensorBoard on request. Rows survive interruptions exactly."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol


class Writer(Protocol):
  """Where rows of numbers go."""

  def write(self, step: int, values: Mapping[str, Any]) -> None: ...

  def close(self) -> None: ...


class JsonlWriter:
  """One JSON object a line, `{"step": 10, "loss": ...}`, flushed at once."""

  def __init__(self, path: pathlib.Path, *, keep_through: int):
    """Opens `path` for appending, after dropping what lies beyond step `keep_through`.

    A run that is resumed from step 100 makes rows 101.. again: the old ones, and a last line that
    was cut short, must not stay beside them.
    """
    if path.exists():
      kept = [
        line
        for line in path.read_text(encoding='utf-8').splitlines()
        if _step_of(line) <= keep_through
      ]
      temporary = path.with_suffix('.tmp')
      temporary.write_text(''.join(line + '\n' for line in kept), encoding='utf-8')
      temporary.replace(path)
    self._file = path.open('a', encoding='utf-8')

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    # JSON has no nan and no infinity.
    finite = {
      name: None if isinstance(value, float) and not math.isfinite(value) else value
      for name, value in values.items()
    }
    self._file.write(json.dumps({'step': step, **finite}) + '\n')
    self._file.flush()

  def close(self) -> None:
    self._file.close()


def _step_of(line: str) -> float:
  try:
    return json.loads(line)['step']
  except (json.JSONDecodeError, KeyError, TypeError):
    return float('inf')


class TensorBoardWriter:
  """TensorBoard event files through tensorboardX (no TensorFlow)."""

  def __init__(self, folder: pathlib.Path, *, keep_through: int, prefix: str = ''):
    from tensorboardX import SummaryWriter  # slow to import, and optional by config

    self._prefix = prefix
    # purge_step hides events of steps that are made again after a resume.
    # The suffix keeps two writers that are opened in the same second from sharing a file.
    suffix = f'.{prefix.strip("/")}' if prefix else ''
    self._writer = SummaryWriter(str(folder), purge_step=keep_through + 1, filename_suffix=suffix)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
      if isinstance(value, int | float):
        self._writer.add_scalar(self._prefix + name, value, step)

  def close(self) -> None:
    self._writer.close()


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a JSONL file; none if it does not exist."""
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
