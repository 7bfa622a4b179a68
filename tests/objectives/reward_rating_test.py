"""Reward models of ratings, worked in float64 NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives.reward_rating import RatingRewardConfig, proportional_odds
from tests.objectives import tabular
from tests.objectives.settings import assert_refused
from tests.objectives.tabular import assert_equals_slow_loss, make_batch, make_outputs


def class_probability(score: float, number: int, cutpoints: tuple[float, ...]) -> float:
  """P(class k) = sigmoid(s - c_k) - sigmoid(s - c_k+1), with cuts at +-infinity at the ends."""
  edges = [-np.inf, *cutpoints, np.inf]

  def above(cut: float) -> float:
    return float(1 / (1 + np.exp(cut - score))) if np.isfinite(cut) else float(cut < 0)

  return above(edges[number]) - above(edges[number + 1])


def test_regression_is_the_mean_squared_error() -> None:
  """Values and gradients."""
  batch, outputs = make_batch('ratings'), make_outputs('ratings')

  def slow(x: dict[str, np.ndarray]) -> float:
    return float(np.mean([(s - r) ** 2 for s, r in zip(x['scores'], batch.score, strict=True)]))

  assert_equals_slow_loss(RatingRewardConfig(), batch, outputs, slow, 'scores')


@pytest.mark.parametrize('cutpoints', [(0.1,), (-0.2, 1.0), (-0.5, 0.0, 0.25, 2.0)])
def test_classes_follow_proportional_odds(cutpoints: tuple[float, ...]) -> None:
  """Every class, ratings equal to a cutpoint among them; values and gradients."""
  batch, outputs = make_batch('ratings'), make_outputs('ratings')

  def slow(x: dict[str, np.ndarray]) -> float:
    losses = []
    for score, rating in zip(x['scores'], batch.score, strict=True):
      number = sum(rating > cut for cut in cutpoints)
      losses.append(-np.log(class_probability(score, number, cutpoints)))
    return float(np.mean(losses))

  config = RatingRewardConfig(variant='classes', cutpoints=cutpoints)
  assert_equals_slow_loss(config, batch, outputs, slow, 'scores')


def test_probabilities_of_all_classes_add_up_to_one() -> None:
  """Whatever the score."""
  cutpoints, scores = (-1.0, 0.5, 2.0), jnp.linspace(-6, 6, 13)
  ratings = (-2.0, 0.0, 1.0, 3.0)
  losses = [proportional_odds(scores, jnp.full(13, rating), cutpoints) for rating in ratings]
  np.testing.assert_allclose(jnp.exp(-jnp.stack(losses)).sum(0), 1.0, rtol=1e-5)


def test_metrics_count_classes() -> None:
  """A score is in the class between whose cutpoints it lies."""
  batch, outputs = make_batch('ratings'), make_outputs('ratings')
  outputs['scores'] = np.array([5.0, 0.0, -3.0, 0.3], np.float32)  # of 1.5, -0.5, 0, 0.25
  config = RatingRewardConfig(variant='classes', cutpoints=(-0.2, 0.5))
  _, metrics, _ = tabular.evaluator(config, tabular.DIRECT)(outputs, batch)
  np.testing.assert_allclose(metrics['class_accuracy'].value(), 2 / 4)
  errors = (outputs['scores'] - batch.score) ** 2
  np.testing.assert_allclose(metrics['squared_error'].value(), errors.mean(), rtol=1e-6)


@pytest.mark.parametrize(
  ('settings', 'field'),
  [
    ({'variant': 'cubic'}, 'variant'),
    ({'variant': 'classes'}, 'cutpoints'),
    ({'cutpoints': (1.0,)}, 'cutpoints'),
    ({'variant': 'classes', 'cutpoints': (1.0, 1.0)}, 'cutpoints'),
    ({'normalization': 'whiten'}, 'normalization'),
    ({'normalization_samples': 1}, 'normalization_samples'),
  ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], field: str) -> None:
  """Cutpoints belong to classes, and ascend."""
  assert_refused(RatingRewardConfig, settings, field)


@pytest.mark.parametrize('size', [1e4, 1e8])
def test_narrow_classes_at_large_scores(size: float) -> None:
  """A class between close cutpoints has its exact width, however large the score."""
  scores, ratings = np.array([size, -size], np.float32), np.array([0.15, 0.15], np.float32)

  def total(scores: jax.Array) -> jax.Array:
    return proportional_odds(scores, jnp.asarray(ratings), (0.1, 0.2)).sum()

  found, slopes = jax.value_and_grad(total)(jnp.asarray(scores))
  # Far above both cuts -log(sigmoid(s - .1) - sigmoid(s - .2)) is s - .2 - log(1 - exp(-.1)), far
  # below them -s + .1 - log(1 - exp(-.1)).
  expected = 2 * size - 0.1 - 2 * np.log(-np.expm1(-0.1))
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  np.testing.assert_allclose(slopes, [1.0, -1.0], rtol=1e-5)
