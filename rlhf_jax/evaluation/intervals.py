"""95% intervals for the numbers of an evaluation, from the answers behind them."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from rlhf_jax.common.errors import NonFiniteError
from rlhf_jax.evaluation.statistics import (
  Interval,
  mean_interval,
  proportion_interval,
  ratio_interval,
)

# Numbers that are rates of outcomes in [0, 1], and the arrays with the outcomes.
RATES = {'win_rate': 'win', 'finished': 'finished', 'held_out_accuracy': 'held_out_right'}
# A number may be a ratio of totals: the arrays of its name with these endings hold the answers'
# parts of numerator and denominator.
RATIO = ('_total', '_weight')


class Measured(NamedTuple):
  """A number with its 95% interval.

  Attributes:
    mean: the number.
    interval: None where there are no answers of its own behind it, or a single one.
    answers: how many prompts or records it is of; None where it has none of its own.
  """

  mean: float
  interval: Interval | None
  answers: int | None


def measured(scalars: Mapping[str, float], arrays: Mapping[str, np.ndarray]) -> dict[str, Measured]:
  """Every scalar of an evaluation with its interval.

  Raises:
    NonFiniteError: a number or an answer is not finite.
  """
  found = {}
  for name, mean in scalars.items():
    sources: tuple[str, ...] = tuple(name + ending for ending in RATIO)
    if sources[0] not in arrays:
      sources = (RATES.get(name, name),)
    answers = [np.asarray(arrays[source], np.float64) for source in sources if source in arrays]
    if not np.isfinite(mean) or not all(np.isfinite(values).all() for values in answers):
      raise NonFiniteError(f'{name}: {mean}, some of the answers behind it are not finite numbers.')
    count = len(answers[0]) if len(answers) == len(sources) else None
    interval = None if count is None or count < 2 else _interval(name, answers)
    found[name] = Measured(float(mean), interval, count)
  return found


def _interval(name: str, answers: list[np.ndarray]) -> Interval:
  if len(answers) == 2:
    return ratio_interval(answers[0], answers[1])
  return proportion_interval(answers[0][None]) if name in RATES else mean_interval(answers[0])
