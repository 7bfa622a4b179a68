"""What is kept of a step that went wrong: enough to make it again, and to see whether it is so.

nonfinite/step_00000012.npz    what the update learnt from, and each response's rewards under
                               `reward/`
nonfinite/step_00000012.json   its metrics; those that are not finite by their names
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.common import processes, trees
from rlhf_jax.common.errors import RunError

FOLDER = 'nonfinite'
_REWARD = 'reward/'
# Rows that a message names; replay names them all.
_NAMED = 5


class Dump(NamedTuple):
  """A step that went wrong.

  Attributes:
    step: the iteration, from 1.
    batch: the leaves of what the update learnt from, by name.
    rewards: `[N]` by name.
    values: metrics.
  """

  step: int
  batch: dict[str, np.ndarray]
  rewards: dict[str, np.ndarray]
  values: dict[str, float]


def reason(values: Mapping[str, float], rewards: Mapping[str, Any]) -> str:
  """What is not finite in a step, the rewards that come first, in words."""
  found = [
    f'reward {name} is {array[rows[0]]} in {"row" if len(rows) == 1 else "rows"} '
    f'{", ".join(map(str, rows[:_NAMED]))}{" ..." if len(rows) > _NAMED else ""}'
    for name, array in processes.to_host(dict(rewards)).items()
    if len(rows := np.flatnonzero(~np.isfinite(array)))
  ]
  names = ('loss', 'gradient_norm')
  found += [f'{name} {values[name]}' for name in names if not np.isfinite(values[name])]
  return ', '.join(found)


def save(
  folder: pathlib.Path,
  step: int,
  batch: Any,
  rewards: Mapping[str, Any],
  values: Mapping[str, float],
) -> pathlib.Path:
  """Writes a step into a run directory and returns the path of its arrays; all processes call."""
  path = folder / FOLDER / f'step_{step:08}.npz'
  kept = {_REWARD + name: array for name, array in rewards.items()}
  arrays = processes.to_host({**trees.flatten(batch), **kept})
  if processes.is_main():
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name('unfinished.npz')
    np.savez(temporary, **arrays)
    # JSON has no nan and no infinity: their names stand for them.
    written = {name: x if np.isfinite(x) else str(x) for name, x in values.items()}
    path.with_suffix('.json').write_text(json.dumps({'step': step, **written}, indent=1))
    temporary.replace(path)
  return path


def steps(folder: pathlib.Path) -> list[int]:
  """The steps that a run directory has kept, in order."""
  return sorted(int(path.stem.partition('_')[2]) for path in (folder / FOLDER).glob('step_*.npz'))


def load(folder: pathlib.Path, step: int) -> Dump:
  """Reads a step; raises RunError where it cannot be read."""
  path = folder / FOLDER / f'step_{step:08}.npz'
  try:
    with np.load(path, allow_pickle=False) as saved:
      arrays = {name: saved[name] for name in saved.files}
    values = json.loads(path.with_suffix('.json').read_text(encoding='utf-8'))
    values = {name: float(value) for name, value in values.items() if name != 'step'}
  except (OSError, ValueError, TypeError, EOFError) as error:
    raise RunError(f'{path}: damaged ({error}).') from error

  batch = {name: array for name, array in arrays.items() if not name.startswith(_REWARD)}
  rewards = {name[len(_REWARD) :]: x for name, x in arrays.items() if name.startswith(_REWARD)}
  return Dump(step, batch, rewards, values)
