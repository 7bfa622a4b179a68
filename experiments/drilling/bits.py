"""Whether two runs are the same to the bit, wherever they lie and however long they took."""

import json
import pathlib
import re
from typing import Any

import numpy as np

# Wall time, and what names the folder: all else must be equal.
_OWN = ('seconds', 'command')
# Wall time in what a report says was held equal.
_SECONDS = re.compile(r'\b\d+ s\b')
_FILES = ('summary.json', 'result.json', 'metrics.jsonl', 'evaluations.jsonl', 'health.jsonl')


def differences(found: pathlib.Path, expected: pathlib.Path) -> list[str]:
  """What differs between the finished runs below two folders, a line each; nothing if all is equal.

  Compared are results (with the SHA-256 of the final parameters), every row of metrics, every
  evaluation with its samples, and a study's summary.
  """
  lines = []
  for path in sorted(expected.rglob('*')):
    name = path.relative_to(expected)
    if path.name in _FILES:
      compare = _compare_json
    elif path.suffix == '.npz' and path.parent.name == 'evaluations':
      compare = _compare_arrays
    else:
      continue
    if not (found / name).exists():
      lines.append(f'{name}: missing')
    elif difference := compare(found / name, path):
      lines.append(f'{name}: {difference}')
  more = {path.relative_to(found) for path in found.rglob('result.json')}
  known = {path.relative_to(expected) for path in expected.rglob('result.json')}
  lines += [f'{name}: not expected' for name in sorted(more - known)]
  return lines


def _compare_json(found: pathlib.Path, expected: pathlib.Path) -> str:
  texts = [path.read_text(encoding='utf-8') for path in (found, expected)]
  if found.suffix == '.jsonl':
    rows = [[_timeless(json.loads(line)) for line in text.splitlines()] for text in texts]
    if len(rows[0]) != len(rows[1]):
      return f'{len(rows[0])} rows, not {len(rows[1])}'
    for number, (row, wanted) in enumerate(zip(*rows, strict=True), 1):
      if row != wanted:
        return f'row {number} differs: {_first_difference(row, wanted)}'
    return ''
  values = [_timeless(json.loads(text)) for text in texts]
  return '' if values[0] == values[1] else _first_difference(*values)


def _timeless(values: Any) -> Any:
  if isinstance(values, dict):
    kept = {name: _timeless(value) for name, value in values.items() if name not in _OWN}
    if 'matched' in kept:
      kept['matched'] = _SECONDS.sub('', json.dumps(kept['matched']))
    return kept
  return [_timeless(value) for value in values] if isinstance(values, list) else values


def _first_difference(found: Any, expected: Any, path: str = '') -> str:
  if isinstance(found, dict) and isinstance(expected, dict):
    for name in [*expected, *(name for name in found if name not in expected)]:
      if found.get(name) != expected.get(name):
        return _first_difference(found.get(name), expected.get(name), f'{path}.{name}')
  if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
    for number, (value, wanted) in enumerate(zip(found, expected, strict=True)):
      if value != wanted:
        return _first_difference(value, wanted, f'{path}[{number}]')
  return f'{path.lstrip(".")} is {found!r:.80}, not {expected!r:.80}'


def _compare_arrays(found: pathlib.Path, expected: pathlib.Path) -> str:
  with (
    np.load(found, allow_pickle=False) as arrays,
    np.load(expected, allow_pickle=False) as wanted,
  ):
    if sorted(arrays) != sorted(wanted):
      return f'has {sorted(arrays)}, not {sorted(wanted)}'
    for name, array in wanted.items():
      equal_nan = array.dtype.kind == 'f'
      if not np.array_equal(arrays[name], array, equal_nan=equal_nan):
        return f'{name} differs'
  return ''
