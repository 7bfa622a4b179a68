"""Simulated annotators choose with the probabilities they are said to."""

import itertools
import math

import numpy as np
import pytest

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.feedback.labelling import LabelConfig, bayes_accuracy, label, population, rank

ROWS = 40_000


def _labels(gap, *, temperature=1.0, flip_rate=0.0, seed=0, rows=ROWS):
  scores = np.tile([gap, 0.0], (rows, 1))
  rng = np.random.default_rng(seed)
  return label(scores, np.array([temperature]), flip_rate, rng)


@pytest.mark.parametrize('gap', [-2.0, -0.3, 0.0, 1.0])
@pytest.mark.parametrize('temperature', [0.5, 2.0])
@pytest.mark.parametrize('flip_rate', [0.0, 0.2])
def test_the_share_of_labels_is_bradley_terry_with_flips(gap, temperature, flip_rate):
  """P(first) = (1 - f) sigmoid(gap / T) + f sigmoid(-gap / T), within 4 standard errors."""
  wins = 1 / (1 + math.exp(-gap / temperature))
  expected = (1 - flip_rate) * wins + flip_rate * (1 - wins)
  labels = _labels(gap, temperature=temperature, flip_rate=flip_rate)
  assert abs(labels.first.mean() - expected) < 4 * 0.5 / math.sqrt(ROWS)
  np.testing.assert_allclose(labels.probability[labels.first], expected)
  np.testing.assert_allclose(labels.probability[~labels.first], 1 - expected)


def test_swapping_the_responses_mirrors_the_probabilities():
  scores = np.random.default_rng(0).normal(size=(100, 2))
  one = label(scores, np.array([0.7]), 0.1, np.random.default_rng(1))
  other = label(scores[:, ::-1], np.array([0.7]), 0.1, np.random.default_rng(1))
  first = np.where(one.first, one.probability, 1 - one.probability)
  second = np.where(other.first, 1 - other.probability, other.probability)
  np.testing.assert_allclose(first, second)


def test_temperature_zero_is_a_choice_without_noise_and_a_tie_stays_a_tie():
  scores = np.array([[1.0, 0.0], [0.0, 1e-9], [3.0, 3.0]])
  labels = label(scores, np.zeros(1), 0.0, np.random.default_rng(0))
  assert labels.first[:2].tolist() == [True, False]
  assert labels.probability.tolist() == [1.0, 1.0, 0.5]
  assert bayes_accuracy(labels.probability[:2]) == 1.0
  flipped = label(scores, np.zeros(1), 0.1, np.random.default_rng(0))
  assert bayes_accuracy(flipped.probability[:2]) == pytest.approx(0.9)


def test_huge_gaps_neither_overflow_nor_warn():
  with np.errstate(over='raise', divide='raise', invalid='raise'):
    labels = _labels(1e300, temperature=1e-6, rows=3)
  assert labels.first.all() and (labels.probability == 1).all()


def test_bayes_accuracy_is_what_the_gold_order_attains():
  """One who prefers the higher score is right as often as `bayes_accuracy` says, and no oftener."""
  scores = np.random.default_rng(0).normal(size=(ROWS, 2))
  labels = label(scores, np.array([0.3, 2.0]), 0.05, np.random.default_rng(1))
  right = labels.first == (scores[:, 0] > scores[:, 1])
  assert abs(right.mean() - bayes_accuracy(labels.probability)) < 4 * 0.5 / math.sqrt(ROWS)


def test_annotators_share_the_work_and_differ_in_their_noise():
  config = LabelConfig(temperature=0.5, annotators=5, annotator_spread=1.0)
  temperatures = population(config, np.random.default_rng(3))
  assert len(set(temperatures)) == 5 and (temperatures > 0).all()
  labels = label(np.tile([1.0, 0.0], (ROWS, 1)), temperatures, 0.0, np.random.default_rng(0))
  for number, temperature in enumerate(temperatures):
    mine = labels.first[labels.annotator == number]
    assert abs(len(mine) / ROWS - 0.2) < 0.01
    assert abs(mine.mean() - 1 / (1 + math.exp(-1 / temperature))) < 4 * 0.5 / math.sqrt(len(mine))


def test_a_population_without_spread_has_one_temperature():
  temperatures = population(LabelConfig(temperature=0.5, annotators=3), np.random.default_rng(0))
  assert temperatures.tolist() == [0.5, 0.5, 0.5]


def _plackett_luce(scores, order, temperature):
  """p(order) as a product of choices among those that are left, by the definition."""
  probability, left = 1.0, list(order)
  for best in order:
    probability *= math.exp(scores[best] / temperature) / sum(
      math.exp(scores[other] / temperature) for other in left
    )
    left.remove(best)
  return probability


@pytest.mark.parametrize('scores', [(1.0, 0.0, -0.5), (0.3, 0.3, 2.0), (0.7, 0.0)])
@pytest.mark.parametrize('flip_rate', [0.0, 0.2])
def test_the_share_of_every_order_is_plackett_luce_with_flips(scores, flip_rate):
  """Of all K! orders, within 4 standard errors; a flip turns the whole order round."""
  temperature, size = 0.7, len(scores)
  rng = np.random.default_rng(0)
  orders = rank(np.tile(scores, (ROWS, 1)), np.array([temperature]), flip_rate, rng)
  total = 0.0
  for order in itertools.permutations(range(size)):
    expected = (1 - flip_rate) * _plackett_luce(scores, order, temperature)
    expected += flip_rate * _plackett_luce(scores, order[::-1], temperature)
    ranks = [order.index(number) + 1 for number in range(size)]
    found = (orders.rank == ranks).all(1).mean()
    assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / ROWS)
    total += found
  assert total == pytest.approx(1.0)  # every row is an order


def test_an_order_without_noise_is_that_of_the_scores():
  scores = np.random.default_rng(0).normal(size=(100, 5))
  orders = rank(scores, np.zeros(1), 0.0, np.random.default_rng(1))
  by_rank = np.take_along_axis(scores, np.argsort(orders.rank, axis=1), axis=1)
  assert (np.diff(by_rank, axis=1) < 0).all()


def test_orders_are_shared_by_annotators_with_noise_of_their_own():
  scores = np.tile([1.0, 0.0], (ROWS, 1))
  orders = rank(scores, np.array([0.0, 5.0]), 0.0, np.random.default_rng(0))
  first = orders.rank[:, 0] == 1
  assert abs(np.mean(orders.annotator) - 0.5) < 0.01
  assert first[orders.annotator == 0].all()
  noisy = first[orders.annotator == 1]
  expected = 1 / (1 + math.exp(-1 / 5.0))
  assert abs(noisy.mean() - expected) < 4 * 0.5 / math.sqrt(len(noisy))


@pytest.mark.parametrize(
  'field, value',
  [
    ('model', 'elo'),
    ('temperature', -0.1),
    ('temperature', math.inf),
    ('temperature', math.nan),
    ('flip_rate', 0.5),
    ('flip_rate', -0.1),
    ('annotators', 0),
    ('annotator_spread', -1.0),
    ('annotator_spread', 0.5),
    ('regret_beta', 0.0),
    ('regret_samples', 0),
  ],
)
def test_impossible_values_are_refused_by_name(field, value):
  with pytest.raises(ConfigError, match=rf'data\.reviews\.labels\.{field}='):
    LabelConfig(**{field: value}).validate('data.reviews.labels')
