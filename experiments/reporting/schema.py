"""The schema of summary.json, which others script against: version 1, checked field by field."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.common.errors import DataError

VERSION = 1
ESTIMATES = ('gold_reward', 'proxy_reward', 'kl', 'win_rate', 'length')
OPTIONAL_ESTIMATES = ('reward',)


def validate_summary(summary: Mapping[str, Any]) -> None:
  """Raises DataError naming the field that is not of schema 1; further fields may be there.

  A summary has `schema`, `rows`, `optimum`, `reward_model` and `findings`. A row has `objective`,
  `seed` (null for pooled), `step`, `tokens`, `seconds` and an estimate `{mean, low, high}` for each
  of `gold_reward`, `proxy_reward`, `kl`, `win_rate`, `length`, and of `reward` where the objective
  is paid something else than gold or proxy reward; no two rows share objective, seed and step.
  `optimum` has points `{kl, gold_reward}` by ascending KL. `reward_model` has `accuracy`
  and `bayes_accuracy` (null where the label noise is unknown), between 0 and 1.
  """
  _fields(summary, ('schema', 'rows', 'optimum', 'reward_model', 'findings'), 'summary')
  if summary['schema'] != VERSION:
    raise _error('summary.schema', summary['schema'], str(VERSION))
  seen = set()
  for index, row in enumerate(_list(summary['rows'], 'rows')):
    seen_as = _check_row(row, f'rows[{index}]')
    if seen_as in seen:
      raise _error(f'rows[{index}]', seen_as, 'objective, seed and step that no other row has')
    seen.add(seen_as)
  last = -math.inf
  for index, point in enumerate(_list(summary['optimum'], 'optimum')):
    path = f'optimum[{index}]'
    _fields(point, ('kl', 'gold_reward'), path)
    _number(point['kl'], f'{path}.kl', 0.0)
    _estimate(point['gold_reward'], f'{path}.gold_reward')
    if point['kl'] <= last:
      raise _error(f'{path}.kl', point['kl'], f'more than that of the point before, {last}')
    last = point['kl']
  _fields(summary['reward_model'], ('accuracy', 'bayes_accuracy'), 'reward_model')
  for name in ('accuracy', 'bayes_accuracy'):
    if summary['reward_model'][name] is not None:
      _number(summary['reward_model'][name], f'reward_model.{name}', 0.0, 1.0)
  for index, finding in enumerate(_list(summary['findings'], 'findings')):
    if not isinstance(finding, str):
      raise _error(f'findings[{index}]', finding, 'text')


def _check_row(row: Any, path: str) -> tuple[Any, ...]:
  _fields(row, ('objective', 'seed', 'step', *ESTIMATES, 'tokens', 'seconds'), path)
  if not isinstance(row['objective'], str) or not row['objective']:
    raise _error(f'{path}.objective', row['objective'], 'a name')
  if row['seed'] is not None and type(row['seed']) is not int:
    raise _error(f'{path}.seed', row['seed'], 'an integer, or null for pooled seeds')
  if type(row['step']) is not int or row['step'] < 0:
    raise _error(f'{path}.step', row['step'], 'an integer of at least 0')
  for name in (*ESTIMATES, *(name for name in OPTIONAL_ESTIMATES if name in row)):
    _estimate(row[name], f'{path}.{name}')
  for name in ('tokens', 'seconds'):
    _number(row[name], f'{path}.{name}', 0.0)
  return row['objective'], row['seed'], row['step']


def _estimate(value: Any, path: str) -> None:
  _fields(value, ('mean', 'low', 'high'), path)
  for name in ('mean', 'low', 'high'):
    _number(value[name], f'{path}.{name}')
  slack = 1e-9 * (1 + abs(value['mean']))
  if not value['low'] - slack <= value['mean'] <= value['high'] + slack:
    raise _error(path, value, 'low <= mean <= high')


def _number(value: Any, path: str, least: float = -math.inf, most: float = math.inf) -> None:
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
    raise _error(path, value, 'a finite number')
  if not least <= value <= most:
    raise _error(path, value, f'a number between {least} and {most}')


def _fields(value: Any, names: Sequence[str], path: str) -> None:
  if not isinstance(value, Mapping):
    raise _error(path, value, 'an object')
  missing = [name for name in names if name not in value]
  if missing:
    raise DataError(f'{path}: expected the fields {", ".join(missing)}, which are missing.')


def _list(value: Any, path: str) -> Sequence[Any]:
  if not isinstance(value, (list, tuple)):
    raise _error(path, value, 'a list')
  return value


def _error(path: str, value: object, expected: str) -> DataError:
  return DataError(f'{path}: expected {expected}, got {value!r}.')
