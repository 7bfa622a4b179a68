"""Files that are either whole or absent, whenever a program or a machine is stopped."""

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import numpy as np


@contextlib.contextmanager
def whole(path: pathlib.Path, temporary: pathlib.Path | None = None) -> Iterator[BinaryIO]:
  """A file to write to, which takes the place of `path` once it is on the disk.

  Args:
    path: of a folder that is there.
    temporary: where it is until then; default: beside it. What several programs may write at once
      needs a name of each.
  """
  temporary = path.with_name(path.name + '.tmp') if temporary is None else temporary
  try:
    with temporary.open('wb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())  # or a machine that fails may have the name and not the content
    temporary.replace(path)
  except OSError:  # no room is left by a half of it
    with contextlib.suppress(OSError):
      temporary.unlink()
    raise


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes UTF-8."""
  with whole(path) as file:
    file.write(text.encode())


def write_arrays(
  path: pathlib.Path, arrays: Mapping[str, np.ndarray], temporary: pathlib.Path | None = None
) -> None:
  """Writes an .npz file, whose arrays have checksums that reading verifies."""
  with whole(path, temporary) as file:
    np.savez(file, **arrays)  # type: ignore[arg-type]
