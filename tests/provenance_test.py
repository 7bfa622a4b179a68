"""The revision of the code is that of its checkout, and marked where files differ."""

import pathlib
import subprocess

import pytest

from rlhf_jax import provenance


def test_the_revision_marks_changed_files(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """None outside a checkout, the hash within, '+' once a file differs from it."""
  monkeypatch.setattr(provenance, '__file__', str(tmp_path / 'runs.py'))
  monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
  assert provenance.git_revision() is None
  (tmp_path / 'runs.py').write_text('')
  for command in (
    ['init', '-q'],
    ['add', '.'],
    ['-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-qm', 'x'],
  ):
    subprocess.run(['git', *command], cwd=tmp_path, check=True)
  revision = provenance.git_revision()
  assert revision is not None and len(revision) == 40
  (tmp_path / 'runs.py').write_text('changed')
  assert provenance.git_revision() == revision + '+'
