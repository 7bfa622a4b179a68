"""Numbers as the report writes them."""

import pytest

from experiments.reporting import text


@pytest.mark.parametrize(
  ('value', 'shown'), [(3.216, '3.22'), (-0.001, '0.00'), (-1.5, '-1.50'), (0.0, '0.00')]
)
def test_numbers_have_no_negative_zero(value, shown):
  assert text.number(value) == shown


def test_intervals_and_rates():
  estimate = {'mean': 0.813, 'low': 0.75, 'high': 0.8642}
  assert text.interval(estimate) == '0.81 [0.75, 0.86]'
  assert text.percent_interval(estimate) == '81.3% [75.0, 86.4]'


@pytest.mark.parametrize(
  ('value', 'shown'),
  [(0, '0'), (950, '950'), (12300, '12.3k'), (1.234e6, '1.23M'), (4.5e9, '4.5G')],
)
def test_counts_are_shortened(value, shown):
  assert text.count(value) == shown


@pytest.mark.parametrize(
  ('value', 'shown'), [(8.41, '8.41 s'), (125, '2 min 05 s'), (11530, '3 h 12 min')]
)
def test_durations(value, shown):
  assert text.seconds(value) == shown
