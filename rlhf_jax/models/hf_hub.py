"""Repositories of the hub, `hf:owner/name[@revision]`: what is small comes at once, tensors later.

Config and tokenizer tell what a model is; plans and messages need no more. Tensors are downloaded
when they are first read.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rlhf_jax.common.errors import CheckpointError
from rlhf_jax.models.hf_files import files_of, names_of

T = TypeVar('T')

HUB = 'hf:'  # what names of the hub start with, as those of data sets do

# Adapters are small as well.
_SMALL = ('*.json', '*.jinja', 'tokenizer*', 'merges.txt', 'vocab*', 'adapter_model.safetensors')
# The same weights in the layouts of their authors, and in folders below.
_NEVER = ('*/*', 'consolidated*')
_MODELS = 'models--'  # how the hub's library begins the folders it keeps models in


@functools.cache  # a name means the same all the time that a program runs
def download(source: str) -> pathlib.Path:
  """The folder of a repository, without its tensors unless they were downloaded before.

  Raises CheckpointError if there is none, or it cannot be reached and is not here yet.
  """
  _, revision = parse(source)
  return _snapshot(source, revision, _SMALL)


def name_of(folder: pathlib.Path) -> str | None:
  """`hf:owner/name@commit` of a folder that was downloaded; None for a folder of the user's own."""
  repository = folder.parent.parent.name
  if folder.parent.name != 'snapshots' or not repository.startswith(_MODELS):
    return None
  name = repository.removeprefix(_MODELS).replace('--', '/')
  return f'{HUB}{name}@{folder.name}'


def parse(source: str) -> tuple[str, str | None]:
  """The name and the revision of `hf:owner/name[@revision]`, None if it names none."""
  name, _, revision = source.removeprefix(HUB).partition('@')
  return name, revision or None


def tensor_files(folder: pathlib.Path, source: str | None) -> list[pathlib.Path]:
  """The files of tensors in a folder.

  Args:
    folder: where they are, or are to be.
    source: the repository that `download` made the folder for, whose tensors are downloaded if they
      are not here yet; None: it is a folder of the user's own.

  Raises:
    CheckpointError: there are none that can be read (nothing is downloaded then), an index is
      damaged, or the hub cannot be reached.
  """
  if source is None:
    return files_of(folder)
  try:
    return files_of(folder)
  except CheckpointError:
    pass
  import huggingface_hub

  name, _ = parse(source)
  # The folder is named by the commit: the tensors are to be those of the config that was read.
  listing = _asked(source, huggingface_hub.list_repo_files, name, revision=folder.name)
  names = names_of(folder, listing, source)
  _snapshot(source, folder.name, names)
  return files_of(folder)


def _snapshot(source: str, revision: str | None, names: Sequence[str]) -> pathlib.Path:
  """Downloads what matches some names."""
  import huggingface_hub

  settings = dict(revision=revision, allow_patterns=list(names), ignore_patterns=list(_NEVER))
  name, _ = parse(source)
  return pathlib.Path(_asked(source, huggingface_hub.snapshot_download, name, **settings))


def _asked(source: str, function: Callable[..., T], *arguments: Any, **settings: Any) -> T:
  """What a function of the hub's library answers."""
  try:
    return function(*arguments, **settings)
  except Exception as error:  # of many kinds: names, networks, permissions, disks
    first = str(error).strip().partition('\n')[0]
    raise CheckpointError(
      f'{source}: could not be downloaded ({type(error).__name__}: {first}). Without a network, '
      'download it elsewhere and name its folder.'
    ) from error
