"""Reads the fixtures beside it: what published implementations compute for small fixed inputs."""

import json
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent


def names() -> list[str]:
  """The fixtures there are."""
  return sorted(path.stem for path in HERE.glob('*.npz'))


def load(name: str) -> dict[str, Any]:
  """One fixture.

  Args:
    name: of the file, without its ending: 'dpo'.

  Returns:
    `about`: the reference, its version or commit and the functions that were run; `inputs`: arrays
    by name, shared by all cases; `cases`: by name, each with `hyperparameters`, `outputs` and
    `gradients` (of its `outputs['loss']`, by the name of the input they belong to).
  """
  with np.load(HERE / f'{name}.npz') as file:
    arrays = {key: file[key] for key in file.files}
  about = json.loads(str(arrays.pop('about')))
  cases: dict[str, dict[str, dict[str, Any]]] = {
    case: {'hyperparameters': values, 'outputs': {}, 'gradients': {}}
    for case, values in about.pop('cases').items()
  }
  inputs = {}
  for key, array in arrays.items():
    kind, *path = key.split('/')
    if kind == 'inputs':
      inputs[path[0]] = array
    else:
      cases[path[0]][kind][path[1]] = array
  return {'about': about, 'inputs': inputs, 'cases': cases}
