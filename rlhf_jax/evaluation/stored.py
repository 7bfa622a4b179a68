"""What an evaluation measured and sampled, read back from its file."""

import pathlib
import zipfile
import zlib

import numpy as np

from rlhf_jax.common.errors import RunError


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of an .npz file, by name; objects, which would be unpickled, are damage.

  Raises RunError where there is no such file, or it is damaged.
  """
  try:
    with np.load(path, allow_pickle=False) as arrays:
      return dict(arrays)
  except FileNotFoundError:
    raise RunError(f'{path}: missing. Run the command of its directory again.') from None
  except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise RunError(f'{path}: damaged ({error}). Run the stage in another folder.') from error
