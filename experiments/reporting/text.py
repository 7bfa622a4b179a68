"""Numbers as the report writes them."""

from collections.abc import Mapping
from typing import Any


def number(value: float, digits: int = 2) -> str:
  """A fixed number of decimals, without a negative zero."""
  text = f'{value:.{digits}f}'
  return text.lstrip('-') if float(text) == 0 else text


def interval(estimate: Mapping[str, float], digits: int = 2) -> str:
  """`3.21 [3.05, 3.37]`."""
  mean, low, high = (number(estimate[name], digits) for name in ('mean', 'low', 'high'))
  return f'{mean} [{low}, {high}]'


def percent(value: float) -> str:
  return f'{number(100 * value, 1)}%'


def percent_interval(estimate: Mapping[str, float]) -> str:
  """`81.3% [75.0, 86.4]`."""
  mean, low, high = (number(100 * estimate[name], 1) for name in ('mean', 'low', 'high'))
  return f'{mean}% [{low}, {high}]'


def count(value: float) -> str:
  """A large count, shortened: 950, 12.3k, 1.23M, 4.5G."""
  for size, letter in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if abs(value) >= size:
      return f'{value / size:.3g}{letter}'
  return f'{value:.4g}'


def seconds(value: float) -> str:
  """`8.4 s`, `2 min 05 s`, `3 h 12 min`."""
  if value < 60:
    return f'{value:.3g} s'
  if value < 3600:
    return f'{int(value) // 60} min {int(value) % 60:02d} s'
  return f'{int(value) // 3600} h {int(value) % 3600 // 60:02d} min'


def who(row: Mapping[str, Any]) -> str:
  """`ppo (seed 1, step 40)`."""
  seed = 'all seeds' if row['seed'] is None else f'seed {row["seed"]}'
  return f'{row["objective"]} ({seed}, step {row["step"]})'
