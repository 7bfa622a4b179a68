"""Simulated annotators choose with the probabilities they are said to."""

import math

import numpy as np
import pytest

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.feedback.labelling import LabelConfig, bayes_accuracy, label, population

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
