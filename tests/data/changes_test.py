"""A file is the same as long as its content is."""

import os
import pathlib

import pytest

from rlhf_jax.common.errors import DataError
from rlhf_jax.data import changes


def test_content_counts_not_the_time_of_change(tmp_path: pathlib.Path) -> None:
  path = tmp_path / 'rows.jsonl'
  path.write_text('one')
  before = changes.file_state(str(path))
  changes.require_unchanged(str(path), before)
  os.utime(path, ns=(0, 0))
  changes.require_unchanged(str(path), before)
  copy = tmp_path / 'copy'
  copy.write_text('one')
  copy.replace(path)
  changes.require_unchanged(str(path), before)


def test_other_content_and_a_file_that_is_gone_or_new_are_refused(tmp_path: pathlib.Path) -> None:
  path = tmp_path / 'rows.jsonl'
  assert changes.file_state(str(path)) is None
  changes.require_unchanged(str(path), None)
  path.write_text('one')
  with pytest.raises(DataError, match=r'rows.jsonl: changed since .* \(no file then, SHA-256'):
    changes.require_unchanged(str(path), None)
  before = changes.file_state(str(path))
  path.write_text('two')
  with pytest.raises(DataError, match='put it back, or start again'):
    changes.require_unchanged(str(path), before)
  path.unlink()
  with pytest.raises(DataError, match='no file now'):
    changes.require_unchanged(str(path), before)
