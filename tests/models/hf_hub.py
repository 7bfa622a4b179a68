"""A hub without a network: a folder of repositories, and a record of what is downloaded."""

import fnmatch
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlhf_jax.models import hf_hub

COMMIT = '0123456789abcdef'


class Hub:
  """Stands in for the functions of huggingface_hub that the library calls.

  Attributes:
    remote: a folder `owner/name` for each repository.
    local: what was downloaded, a folder `models--owner--name/snapshots/COMMIT` each.
    revisions: those that were asked for.
    reachable: whether there is a network.
  """

  def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    self.remote, self.local = folder / 'remote', folder / 'local'
    self.revisions: list[str | None] = []
    self.reachable = True
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', self._download)
    monkeypatch.setattr(huggingface_hub, 'list_repo_files', self._list)
    hf_hub.download.cache_clear()

  def add(self, name: str, source: Path) -> Path:
    """Makes a repository of a folder."""
    shutil.copytree(source, self.remote / name)
    return self.remote / name

  def downloaded(self, name: str) -> set[str]:
    """The names of the files that are here."""
    return {path.name for path in self._snapshot(name).glob('*')}

  def _snapshot(self, name: str) -> Path:
    return self.local / f'models--{name.replace("/", "--")}' / 'snapshots' / COMMIT

  def _list(self, name: str, revision: str | None) -> list[str]:
    self._connect(revision)
    return [str(path.relative_to(self.remote / name)) for path in (self.remote / name).rglob('*')]

  def _download(
    self,
    name: str,
    *,
    revision: str | None,
    allow_patterns: list[str],
    ignore_patterns: list[str],
  ) -> str:
    target = self._snapshot(name)
    if not self.reachable and target.is_dir():
      return str(target)
    for file in self._list(name, revision):
      wanted, refused = (
        any(fnmatch.fnmatch(file, pattern) for pattern in patterns)
        for patterns in (allow_patterns, ignore_patterns)
      )
      if wanted and not refused:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.remote / name / file, target / file)
    return str(target)

  def _connect(self, revision: Any) -> None:
    if not self.reachable:
      raise OSError('no route to host\nand more')
    self.revisions.append(revision)
