"""Intervals: known values, coverage by simulation, and what they must not do."""

import numpy as np
import pytest
from scipy import stats

from rlhf_jax.evaluation import statistics
from rlhf_jax.evaluation.statistics import Interval, mean_interval, ratio_interval


def test_mean_interval_is_scipys_t_interval():
  values = np.array([1.0, 4.0, 2.5, 7.0, 3.0])
  expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
  found = statistics.mean_interval(values)
  assert found.mean == pytest.approx(3.5)
  assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_completions_of_a_prompt_do_not_count_as_more_prompts():
  """Repeating every completion ten times must not narrow the interval."""
  values = np.random.default_rng(0).normal(size=20)
  repeated = np.repeat(values[:, None], 10, axis=1)
  once, often = statistics.mean_interval(values), statistics.mean_interval(repeated)
  assert (once.low, once.high) == pytest.approx((often.low, often.high))


@pytest.mark.parametrize('bad', [np.zeros(1), np.zeros((2, 3, 4)), np.array([0.0, np.nan])])
def test_too_few_or_not_finite_values_are_refused(bad):
  with pytest.raises(ValueError, match='expected|finite'):
    statistics.mean_interval(bad)


@pytest.mark.parametrize(
  ('seed_spread', 'prompt_spread', 'noise'), [(0.0, 1.0, 1.0), (0.3, 1.0, 1.0), (1.0, 0.1, 0.1)]
)
def test_pooled_interval_covers_the_truth(seed_spread, prompt_spread, noise):
  """Crossed random effects with mean 0: the interval holds 0 in at least about 95% of studies.

  800 studies put the coverage of an exact method within 0.95 +- 0.016 (two standard errors).
  """
  rng = np.random.default_rng(1)
  held = 0
  for _ in range(800):
    values = rng.normal(size=(3, 1)) * seed_spread + rng.normal(size=(1, 40)) * prompt_spread
    interval = statistics.pooled_interval(values + noise * rng.normal(size=(3, 40)))
    held += interval.low <= 0 <= interval.high
  assert held / 800 > 0.93


def test_pooled_interval_keeps_the_uncertainty_of_the_shared_prompts():
  """Three seeds that agree say nothing new of the prompts: the interval stays as wide."""
  values = np.random.default_rng(2).normal(size=50)
  one = statistics.pooled_interval(values[None])
  three = statistics.pooled_interval(np.stack([values] * 3))
  assert (three.low, three.high) == pytest.approx((one.low, one.high))


def test_pooled_interval_widens_with_the_spread_of_the_seeds():
  values = np.random.default_rng(3).normal(size=50)
  apart = statistics.pooled_interval(np.stack([values - 1, values, values + 1]))
  together = statistics.pooled_interval(np.stack([values] * 3))
  assert apart.high - apart.low > 3 * (together.high - together.low)


def test_constant_values_have_no_width():
  assert statistics.pooled_interval(np.full((3, 4), 2.0)) == Interval(2.0, 2.0, 2.0)


def test_win_rate_of_independent_outcomes_is_near_wilsons_interval():
  """40 wins of 100: Wilson's 95% interval is [0.3094, 0.4980] (scipy's binomtest)."""
  outcomes = np.repeat([1.0, 0.0], [40, 60])[None]
  expected = stats.binomtest(40, 100).proportion_ci(0.95, 'wilson')
  found = statistics.proportion_interval(outcomes)
  assert found.mean == pytest.approx(0.4)
  assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=3e-3)


@pytest.mark.parametrize(('outcome', 'end'), [(1.0, 'high'), (0.0, 'low')])
def test_win_rate_of_equal_outcomes_keeps_a_width_inside_the_unit_interval(outcome, end):
  found = statistics.proportion_interval(np.full((3, 20), outcome))
  assert getattr(found, end) == pytest.approx(outcome)
  assert 0.1 < found.high - found.low < 0.25


def test_a_tie_is_half_a_win_and_losing_mirrors_winning():
  assert statistics.proportion_interval(np.array([[0.5, 0.5, 1.0, 0.0]])).mean == 0.5
  outcomes = np.random.default_rng(4).choice([0.0, 0.5, 1.0], size=(3, 30), p=[0.2, 0.1, 0.7])
  won, lost = (statistics.proportion_interval(x) for x in (outcomes, 1 - outcomes))
  assert (won.mean, won.low, won.high) == pytest.approx(
    (1 - lost.mean, 1 - lost.high, 1 - lost.low)
  )


def test_win_rates_outside_the_unit_interval_are_refused():
  with pytest.raises(ValueError, match='between 0'):
    statistics.proportion_interval(np.array([[0.0, 1.5]]))


def test_bootstrap_means_have_the_standard_error_of_the_mean():
  values = np.random.default_rng(5).normal(size=(60, 2))
  means = statistics.bootstrap_means(values, 4000, seed=0)
  assert means.shape == (4000, 2)
  np.testing.assert_allclose(means.mean(0), values.mean(0), atol=0.01)
  np.testing.assert_allclose(means.std(0), values.std(0) / np.sqrt(60), rtol=0.05)


def test_bootstrap_draws_whole_prompts():
  """Two columns that always sum to 1 still do in every replicate."""
  left = np.random.default_rng(6).normal(size=30)
  means = statistics.bootstrap_means(np.stack([left, 1 - left], 1), 50, seed=0)
  np.testing.assert_allclose(means.sum(1), 1.0)


def test_percentile_interval_contains_its_estimate():
  assert statistics.percentile_interval(5.0, np.array([1.0, 2.0, 3.0])).high == 5.0


def test_overlap_is_symmetric_and_closed():
  low, high = Interval(0.5, 0.0, 1.0), Interval(1.5, 1.0, 2.0)
  assert low.overlaps(high) and high.overlaps(low)
  assert not low.overlaps(Interval(1.5, 1.01, 2.0))
  assert Interval.from_dict(low.to_dict()) == low


def test_a_ratio_with_equal_counts_is_a_mean() -> None:
  """With c in every denominator the interval is that of the mean of total / c."""
  totals = np.random.default_rng(5).normal(2.0, 1.0, size=25)
  found = ratio_interval(totals, np.full(25, 4))
  expected = mean_interval(totals / 4)
  np.testing.assert_allclose(
    [found.mean, found.low, found.high], [expected.mean, expected.low, expected.high]
  )


def test_the_ratio_interval_covers() -> None:
  """Of 400 samples of 60 sequences, about 95% of the intervals hold the true nats a token."""
  rng = np.random.default_rng(6)
  counts = rng.integers(1, 20, size=(400, 60))
  # A level of its own for each sequence: its tokens are not independent.
  totals = counts * rng.gamma(4.0, 0.5, size=(400, 60))
  found = [ratio_interval(*row) for row in zip(totals, counts, strict=True)]
  covered = np.mean([interval.low <= 2.0 <= interval.high for interval in found])
  assert 0.92 <= covered <= 0.98


def test_a_ratio_of_nothing_is_refused() -> None:
  """Counts that sum to 0, one record, or unequal lengths."""
  for totals, counts in (([1.0, 2.0], [0, 0]), ([1.0], [1]), ([1.0, 2.0], [1, 2, 3])):
    with pytest.raises(ValueError):
      ratio_interval(np.array(totals), np.array(counts))
