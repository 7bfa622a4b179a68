"""What is written is whole or absent."""

import pathlib

import numpy as np
import pytest

from rlhf_jax.common import files


def test_what_was_there_stays_until_the_new_is_whole(tmp_path: pathlib.Path) -> None:
  path = tmp_path / 'a.json'
  files.write_text(path, 'old ☃')
  with pytest.raises(OSError, match='no room'), files.whole(path) as file:
    file.write(b'half')
    assert path.read_text(encoding='utf-8') == 'old ☃'
    raise OSError('no room')
  assert [path.name for path in tmp_path.iterdir()] == ['a.json'], 'the half takes no room'
  files.write_text(path, 'new')
  assert path.read_text() == 'new'


def test_arrays_have_checksums(tmp_path: pathlib.Path) -> None:
  """A bit that changes later is noticed by whoever reads them."""
  path = tmp_path / 'a.npz'
  array = np.arange(1000.0)
  files.write_arrays(path, {'x': array}, tmp_path / 'mine')
  with np.load(path) as saved:
    np.testing.assert_array_equal(saved['x'], array)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  with pytest.raises(Exception, match='CRC'), np.load(path) as saved:
    saved['x']
