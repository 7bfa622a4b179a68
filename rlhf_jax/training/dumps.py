"""What is kept of a step that went wrong: enough to make it again, and to see whether it is so.

nonfinite/step_00000012.npz    what the update learnt from; the samples that this was made from,
                               under `sample/`, and their rewards, under `reward/`
nonfinite/step_00000012.json   its metrics; those that are not finite by their names
"""

import json
import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from rlhf_jax.common import files, processes, trees
from rlhf_jax.common.errors import RunError
from rlhf_jax.training.recipe import Prepared

FOLDER = 'nonfinite'
_SAMPLE, _REWARD = 'sample/', 'reward/'
# Rows that a message names; replay names them all.
_NAMED = 5


class Dump(NamedTuple):
  """A step that went wrong.

  Attributes:
    step: the iteration, from 1.
    batch: the leaves of what the update learnt from, by name.
    samples: the leaves of the `Sequences` that it was made from; none where it was given.
    rewards: what they were paid, `[N]` by name.
    values: metrics.
  """

  step: int
  batch: dict[str, np.ndarray]
  samples: dict[str, np.ndarray]
  rewards: dict[str, np.ndarray]
  values: dict[str, float]


def _rewards(prepared: Prepared) -> dict[str, np.ndarray]:
  """What samples were paid, `[N]` by name, on the host; all processes ask."""
  rewards = processes.to_host(prepared.rewards)
  return {name: rewards[:, number] for number, name in enumerate(prepared.reward_names)}


def reason(values: Mapping[str, float], prepared: Prepared) -> str:
  """What is not finite in a step, the rewards that come first, in words; all processes ask."""
  found = [
    f'reward {name} is {array[rows[0]]} in {"row" if len(rows) == 1 else "rows"} '
    f'{", ".join(map(str, rows[:_NAMED]))}{" ..." if len(rows) > _NAMED else ""}'
    for name, array in _rewards(prepared).items()
    if len(rows := np.flatnonzero(~np.isfinite(array)))
  ]
  names = ('loss', 'gradient_norm')
  found += [f'{name} {values[name]}' for name in names if not np.isfinite(values[name])]
  return ', '.join(found)


def arrays_of(prepared: Prepared) -> dict[str, np.ndarray]:
  """What is kept of a step's beginning, on the host; all processes ask."""
  kept = {_SAMPLE + name: leaf for name, leaf in trees.flatten(prepared.samples).items()}
  arrays = processes.to_host({**trees.flatten(prepared.batch), **kept})
  return {**arrays, **{_REWARD + name: x for name, x in _rewards(prepared).items()}}


def save(
  folder: pathlib.Path, step: int, prepared: Prepared, values: Mapping[str, float]
) -> pathlib.Path:
  """Writes a step into a run directory and returns the path of its arrays; all processes call."""
  path = folder / FOLDER / f'step_{step:08}.npz'
  arrays = arrays_of(prepared)
  if processes.is_main():
    path.parent.mkdir(exist_ok=True)
    # JSON has no nan and no infinity: their names stand for them.
    written = {name: x if np.isfinite(x) else str(x) for name, x in values.items()}
    files.write_text(path.with_suffix('.json'), json.dumps({'step': step, **written}, indent=1))
    files.write_arrays(path, arrays)
  return path


def steps(folder: pathlib.Path) -> list[int]:
  """The steps that a run directory has kept, in order."""
  names = (path.stem.removeprefix('step_') for path in (folder / FOLDER).glob('step_*.npz'))
  return sorted(int(name) for name in names if name.isdecimal())


def load(folder: pathlib.Path, step: int) -> Dump:
  """Reads a step; raises RunError where it cannot be read."""
  path = folder / FOLDER / f'step_{step:08}.npz'
  try:
    with np.load(path, allow_pickle=False) as saved:
      arrays = {name: saved[name] for name in saved.files}
    values = json.loads(path.with_suffix('.json').read_text(encoding='utf-8'))
    values = {name: float(value) for name, value in values.items() if name != 'step'}
  except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise RunError(f'{path}: damaged ({error}).') from error
  return dump_of(step, arrays, values)


def dump_of(step: int, arrays: Mapping[str, np.ndarray], values: dict[str, float]) -> Dump:
  """A dump from the arrays of `arrays_of`."""

  def part(prefix: str) -> dict[str, np.ndarray]:
    return {name[len(prefix) :]: x for name, x in arrays.items() if name.startswith(prefix)}

  batch = {name: x for name, x in arrays.items() if not name.startswith((_SAMPLE, _REWARD))}
  return Dump(step, batch, part(_SAMPLE), part(_REWARD), values)
