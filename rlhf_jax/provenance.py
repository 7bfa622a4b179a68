"""Where a result comes from, beside its config: code, packages, devices."""

import importlib.metadata
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

from rlhf_jax import __version__
from rlhf_jax.common import determinism

# Of what is recorded, what may change the last bits of a result.
BITS_DEPEND_ON = (
  'git_revision',
  'packages',
  'backend',
  'devices',
  'processes',
  'mesh',
  'deterministic',
)
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'transformers')


def git_revision() -> str | None:
  """The revision of the code, with '+' when files differ from it; None outside a checkout."""
  folder = pathlib.Path(__file__).parent

  def git(*arguments: str) -> str:
    return subprocess.run(
      ['git', *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()

  try:
    return git('rev-parse', 'HEAD') + ('+' if git('status', '--porcelain', '-uno') else '')
  except (OSError, subprocess.SubprocessError):
    return None


def environment_record() -> dict[str, Any]:
  """What a result depends on beside its config."""

  def version(package: str) -> str | None:
    try:
      return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      return None

  return {
    'rlhf_jax': __version__,
    'git_revision': git_revision(),
    'packages': {package: version(package) for package in _PACKAGES},
    'python': platform.python_version(),
    'backend': jax.default_backend(),
    'devices': [device.device_kind for device in jax.devices()],
    'processes': jax.process_count(),
    'deterministic': determinism.holds(),
    'command': sys.argv,
  }
