"""What programs share: the checks of flags that several of them have."""

import pathlib

import pytest

from experiments import cli
from rlhf_jax.common.errors import UserError


def test_only_flags_that_were_given_count() -> None:
  """Zero and the empty text are values."""
  assert cli.not_none({'a': None, 'b': 0, 'c': '', 'd': 0.5}) == {'b': 0, 'c': '', 'd': 0.5}


def test_the_place_of_the_json_must_be_there(tmp_path: pathlib.Path) -> None:
  """Its folder must exist, and it may replace a file but not a folder."""
  assert cli.json_path(None) is None
  path = tmp_path / 'out.json'
  assert cli.json_path(str(path)) == path
  path.write_text('{}')
  assert cli.json_path(str(path)) == path
  with pytest.raises(UserError, match=f'--json=.*there is no folder {tmp_path / "absent"}'):
    cli.json_path(str(tmp_path / 'absent' / 'out.json'))
  for folder in (str(tmp_path), ''):
    with pytest.raises(UserError, match='a folder; name a file'):
      cli.json_path(folder)
