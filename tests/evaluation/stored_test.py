"""Arrays are read from whole files, without objects."""

import pathlib

import numpy as np
import pytest

from rlhf_jax.common.errors import RunError
from rlhf_jax.evaluation import stored


class Trap:
  """Unpickled, it leaves a file behind."""

  def __init__(self, path: pathlib.Path):
    self.path = path

  def __reduce__(self) -> tuple:
    return pathlib.Path.touch, (self.path,)


def test_what_was_saved_is_read(tmp_path: pathlib.Path) -> None:
  np.savez(tmp_path / 'a.npz', kl=np.arange(2.0), prompt=np.array(['a', 'b']))
  found = stored.read(tmp_path / 'a.npz')
  assert {name: array.tolist() for name, array in found.items()} == {
    'kl': [0, 1],
    'prompt': ['a', 'b'],
  }


def test_a_pickle_is_damage_and_runs_nothing(tmp_path: pathlib.Path) -> None:
  trap = np.empty(1, object)
  trap[0] = Trap(tmp_path / 'ran')
  np.savez(tmp_path / 'a.npz', kl=trap)
  with pytest.raises(RunError, match='a.npz: damaged .*allow_pickle=False'):
    stored.read(tmp_path / 'a.npz')
  assert not (tmp_path / 'ran').exists()
  with np.load(tmp_path / 'a.npz', allow_pickle=True) as arrays:
    arrays['kl']
  assert (tmp_path / 'ran').exists(), 'the trap is one'


def test_a_file_that_is_missing_cut_or_changed_is_named(tmp_path: pathlib.Path) -> None:
  path = tmp_path / 'a.npz'
  with pytest.raises(RunError, match='a.npz: missing'):
    stored.read(path)
  np.savez(path, kl=np.arange(200.0))
  whole = path.read_bytes()
  changed = bytearray(whole)
  changed[len(whole) // 2] ^= 1
  for content in (b'', whole[:100], whole[:-30], bytes(changed), b'{}'):
    path.write_bytes(content)
    with pytest.raises(RunError, match='a.npz: damaged'):
      stored.read(path)
