"""The reference's log-probs of a whole dataset: worked out once, and kept for whoever asks again.

A file is named after all that its numbers depend on, so every seed and every variant of a study
that starts from one policy and reads the same records, and a run that goes on after a stop, find
it. Losing one costs only the time to make it again.
"""

import hashlib
import os
import pathlib
import zipfile

import jax
import numpy as np

from rlhf_jax.common import files, processes, trees
from rlhf_jax.config_values import canonical_json, to_dict
from rlhf_jax.data.columns import Columns
from rlhf_jax.recipes.parts import Parts

Array = np.ndarray


class ReferenceCache:
  """One dataset's log-probs under one reference, as a file below a run root.

  Attributes:
    path: `ROOT/reference_logprobs/DIGEST.npz`.
    shape: of what it holds, less the width of responses: `[N, ...]`.
  """

  def __init__(self, root: pathlib.Path, parts: Parts, columns: Columns):
    """Names the file. Every process must ask; the reference's parameters are read whole."""
    facts = {
      'model': to_dict(parts.model),
      'reference': trees.sha256(parts.reference),
      'columns': columns.digest(),
      # Other programs, and programs for other hardware, round otherwise: a run's bits must not
      # depend on who came first.
      'rows': parts.config.batch_size,
      'accumulation': parts.config.accumulation,
      'mesh': dict(parts.mesh.shape),
      'device': jax.devices()[0].device_kind,
      'jax': jax.__version__,
    }
    name = hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:32]
    self.path = root / 'reference_logprobs' / f'{name}.npz'
    self.shape = columns.slots.shape

  def load(self) -> Array | None:
    """`[N, ..., R]` float32; None where there is no file, or a damaged one (which is said)."""
    if not processes.on_main(lambda: self._read() is not None):
      return None
    return self._read()

  def save(self, logprobs: Array) -> None:
    """Writes the file whole or not at all; a root that cannot be written to is said, no more."""
    processes.on_main(lambda: self._write(logprobs))

  def _read(self) -> Array | None:
    if not self.path.is_file():
      return None
    try:
      with np.load(self.path, allow_pickle=False) as file:
        logprobs, digest = file['logprobs'], str(file['sha256'])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
      processes.say(f'warning: {self.path}: damaged ({error}), made again')
      return None
    if logprobs.shape[:-1] != self.shape or _sha256(logprobs) != digest:
      processes.say(f'warning: {self.path}: damaged (its checksum is wrong), made again')
      return None
    return logprobs

  def _write(self, logprobs: Array) -> None:
    temporary = self.path.with_name(f'{self.path.name}.{os.getpid()}')
    try:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      arrays = {'logprobs': logprobs, 'sha256': np.array(_sha256(logprobs))}
      files.write_arrays(self.path, arrays, temporary)
    except OSError as error:
      processes.say(f'warning: {self.path}: not kept for the next time ({error})')


def _sha256(array: Array) -> str:
  return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
