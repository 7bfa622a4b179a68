"""Intervals of the numbers that evaluations give."""

import numpy as np
import pytest

from rlhf_jax.common.errors import NonFiniteError
from rlhf_jax.evaluation.intervals import measured
from rlhf_jax.evaluation.statistics import mean_interval, proportion_interval


def test_each_number_gets_the_interval_of_its_kind() -> None:
  """Means over prompts, rates of outcomes, a ratio of totals; none where there are no answers."""
  rng = np.random.default_rng(0)
  kl, win = rng.gamma(2.0, size=40), rng.integers(0, 2, 40).astype(float)
  total, tokens = rng.gamma(2.0, size=30), rng.integers(1, 9, 30)
  scalars = {
    'kl': kl.mean(),
    'win_rate': win.mean(),
    'held_out_nll': total.sum() / tokens.sum(),
    'held_out_calibration_error': 0.1,
  }
  arrays = {'kl': kl, 'win': win, 'held_out_nll_total': total, 'held_out_nll_weight': tokens}
  found = measured(scalars, arrays)
  assert list(found) == list(scalars)
  assert found['kl'] == (kl.mean(), mean_interval(kl), 40)
  assert found['win_rate'] == (win.mean(), proportion_interval(win[None]), 40)
  assert found['held_out_nll'].answers == 30
  interval = found['held_out_nll'].interval
  assert interval is not None
  np.testing.assert_allclose(interval.mean, scalars['held_out_nll'])
  assert interval.low < interval.mean < interval.high
  assert found['held_out_calibration_error'] == (0.1, None, None)


def test_one_answer_has_no_interval() -> None:
  """Nothing is known of how others would vary."""
  assert measured({'kl': 2.0}, {'kl': np.array([2.0])})['kl'] == (2.0, None, 1)


def test_what_is_not_finite_is_named() -> None:
  """A diverged model's numbers are an error, not an interval of nan."""
  with pytest.raises(NonFiniteError, match='proxy_reward'):
    measured({'proxy_reward': np.nan}, {'proxy_reward': np.array([1.0, np.nan])})
