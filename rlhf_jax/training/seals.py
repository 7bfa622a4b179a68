"""What is noted beside the arrays of a checkpoint, and how the two are held against each other.

Progress facts, checksums by part and name (`checksums`), and a SHA-256 over both and the metrics.
"""

import hashlib
import json
from typing import Any

from rlhf_jax.common.errors import RunError

# By part of a state and name of a leaf: dtype, shape and sum.
Sums = dict[str, dict[str, str]]


def seal(progress: dict[str, Any], metrics: dict[str, float] | None, sums: Sums) -> dict[str, Any]:
  """What to note: JSON values, with a digest of their own."""
  return {'progress': progress, 'arrays': sums, 'sha256': _digest(progress, metrics, sums)}


def unseal(noted: Any, metrics: Any) -> tuple[dict[str, Any], Sums]:
  """Progress facts and checksums; raises ValueError if they are not what was noted."""
  if not isinstance(noted, dict) or not {'progress', 'arrays', 'sha256'} <= noted.keys():
    raise ValueError('its _CHECKPOINT_METADATA has no checksums')
  if _digest(noted['progress'], metrics, noted['arrays']) != noted['sha256']:
    raise ValueError('its _CHECKPOINT_METADATA or metrics differ from what was written')
  return noted['progress'], noted['arrays']


def _digest(progress: Any, metrics: Any, sums: Any) -> str:
  noted = [progress, metrics or None, sums]
  return hashlib.sha256(json.dumps(noted, sort_keys=True).encode()).hexdigest()


def check_fits(where: str, part: str, leaves: dict[str, Any], sums: Sums) -> None:
  """Raises RunError unless a part was written with these names, shapes and dtypes."""
  if part not in sums:
    raise RunError(
      f'{where}: there are no {part!r} in this checkpoint; it has {", ".join(sorted(sums))}.'
    )
  found = {name: text.partition(':')[0] for name, text in sums[part].items()}
  wanted = {name: f'{leaf.dtype.name}{list(leaf.shape)}' for name, leaf in leaves.items()}
  for name in sorted(found.keys() | wanted.keys()):
    if found.get(name) != wanted.get(name):
      raise RunError(
        f'{where}: {part} {name!r} is {found.get(name, "absent")} in the checkpoint, expected '
        f'{wanted.get(name, "absent")}: it was written by a run with another model, objective or '
        'optimizer.'
      )


def check_values(found: Sums, sums: Sums) -> None:
  """Raises ValueError unless the sums of what was read are those of what was written."""
  for part, names in found.items():
    if changed := [name for name in names if names[name] != sums[part][name]]:
      more = f' and {len(changed) - 1} others' if len(changed) > 1 else ''
      raise ValueError(f'{part}: {changed[0]!r}{more} differ from what was written')
