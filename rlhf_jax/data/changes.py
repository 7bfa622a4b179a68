"""Whether a data file is still the one that was read."""

import hashlib
import os
from typing import NamedTuple

from rlhf_jax.common.errors import DataError


class FileState(NamedTuple):
  """A file as it was at some moment.

  Attributes:
    stamp: its device, number, size and time of change: while they stay, it is not read again.
    sha256: of its content.
  """

  stamp: tuple[int, int, int, int]
  sha256: str


def file_state(path: str) -> FileState | None:
  """The state of a file; None where there is none that can be read."""
  try:
    with open(path, 'rb') as file:
      stamp = _stamp(os.fstat(file.fileno()))
      return FileState(stamp, hashlib.file_digest(file, 'sha256').hexdigest())
  except OSError:
    return None


def require_unchanged(path: str, before: FileState | None) -> None:
  """Raises DataError if a file has not the content that it had; None stands for no file."""
  try:
    if before is not None and _stamp(os.stat(path)) == before.stamp:
      return
  except OSError:
    pass
  now = file_state(path)
  contents = [None if state is None else state.sha256 for state in (before, now)]
  if contents[0] != contents[1]:
    was, found = ('no file' if sha is None else f'SHA-256 {sha[:12]}' for sha in contents)
    raise DataError(
      f'{path}: changed since this process first read it ({was} then, {found} now). Stages that '
      'belong together must learn from the same records: put it back, or start again.'
    )


def _stamp(status: os.stat_result) -> tuple[int, int, int, int]:
  return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
