"""Bradley-Terry losses, values and gradients, against float64 NumPy."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.checks import ShapeError
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.objectives.base import Actors
from rlhf_jax.objectives.reward_model import (
  RewardModelConfig,
  bradley_terry,
  loss,
  preference_metrics,
)
from tests import numerical, quick
from tests.golden import golden
from tests.objectives import tabular
from tests.objectives.batches import make_batch

RNG = np.random.default_rng(0)
SCORES: Any = RNG.normal(0, 2, (6, 2))
PREFERENCE: Any = np.array([1.0, 1.0, 0.5, 0.7, 0.0, 1.0])
MARGIN: Any = np.array([0.0, 1.0, 0.5, 2.0, 0.3, 0.0])


def slow_bradley_terry(scores: np.ndarray, coefficient: float) -> np.ndarray:
  """P(first) = exp(r1 - m) / (exp(r1 - m) + exp(r2)), and the mirror image for the second."""
  out = np.zeros(len(scores))
  for i, (first, second) in enumerate(scores):
    m = coefficient * MARGIN[i]
    wins = np.exp(first - m) / (np.exp(first - m) + np.exp(second))
    loses = np.exp(second - m) / (np.exp(second - m) + np.exp(first))
    out[i] = -PREFERENCE[i] * np.log(wins) - (1 - PREFERENCE[i]) * np.log(loses)
  return out


@functools.partial(jax.jit, static_argnums=1)
def fast_bradley_terry(scores: Any, coefficient: float) -> jax.Array:
  """The function under test on the same labels."""
  labels = (jnp.asarray(x, jnp.float32) for x in (PREFERENCE, MARGIN))
  return bradley_terry(jnp.asarray(scores, jnp.float32), *labels, margin_coefficient=coefficient)


@pytest.mark.parametrize('coefficient', [0.0, 1.0, 0.3])
def test_values_and_gradients_equal_the_likelihood(coefficient: float) -> None:
  """-log P of the label with and without margin, soft labels and ties, and its derivative."""
  losses = fast_bradley_terry(SCORES, coefficient)
  assert losses.dtype == jnp.float32
  np.testing.assert_allclose(losses, slow_bradley_terry(SCORES, coefficient), rtol=1e-5)
  slopes = quick.jit(jax.grad(lambda s: fast_bradley_terry(s, coefficient).sum()))(
    SCORES.astype(np.float32)
  )
  expected = numerical.gradient(lambda s: slow_bradley_terry(s, coefficient).sum(), SCORES)
  np.testing.assert_allclose(slopes, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('case', ['plain', 'margin', 'centred', 'both'])
def test_the_loss_is_that_of_trl(case: str) -> None:
  """Loss, gradients and accuracy of its reward trainer (tests/golden/make_reward.py)."""
  found = golden.load('reward')
  inputs, expected = found['inputs'], found['cases'][case]
  settings = expected['hyperparameters']
  config = RewardModelConfig(
    margin_coefficient=float(settings['margin']), center_coefficient=settings['center'] or 0.0
  )
  batch = make_batch('comparisons')
  rows = np.arange(len(inputs['scores'])) % len(batch.preference)
  batch = jax.tree.map(lambda x: x[rows], batch)
  ones = np.ones(len(rows), np.float32)
  batch = dataclasses.replace(batch, preference=ones, margin=inputs['margins'])
  # The scores themselves in the place of a model's parameters.
  actors = Actors(reward=lambda scores, _: jnp.ravel(scores))  # type: ignore[arg-type]

  def total(scores: Any) -> Any:
    mean, metrics = loss(config, actors, scores, batch)
    return mean.value(), metrics['accuracy'].value()

  (value, accuracy), slopes = jax.jit(jax.value_and_grad(total, has_aux=True))(inputs['scores'])
  np.testing.assert_allclose(value, expected['outputs']['loss'], rtol=1e-5)
  np.testing.assert_allclose(accuracy, expected['outputs']['accuracy'], rtol=1e-6)
  np.testing.assert_allclose(slopes, expected['gradients']['scores'], rtol=1e-5, atol=1e-6)


def test_a_worked_example() -> None:
  """Scores 1 and 0 with a plain label: log(1 + e^-1); margin 1: log 2; a tie of equals: log 2."""
  losses = bradley_terry(
    jnp.array([[1.0, 0.0], [1.0, 0.0], [3.0, 3.0]]),
    jnp.array([1.0, 1.0, 0.5]),
    jnp.array([0.0, 1.0, 0.0]),
    margin_coefficient=1.0,
  )
  np.testing.assert_allclose(losses, [np.log1p(np.exp(-1)), np.log(2), np.log(2)], rtol=1e-6)


@pytest.mark.parametrize('shift', [-1e3, 50.0])
def test_only_the_difference_of_scores_matters(shift: float) -> None:
  """Bradley-Terry does not identify the level of scores: that is what centring is for."""
  exact = np.round(SCORES * 8) / 8  # so that the shift rounds nothing away
  np.testing.assert_allclose(
    fast_bradley_terry(exact + shift, 0.5), fast_bradley_terry(exact, 0.5), rtol=1e-6
  )


def test_the_loss_adds_centring_and_averages_over_pairs() -> None:
  """Bradley-Terry with margin + coefficient (r1 + r2)^2, summed over pairs; their number."""
  config = RewardModelConfig(margin_coefficient=0.7, center_coefficient=0.01)
  batch, outputs = tabular.make_batch('comparisons'), tabular.make_outputs('comparisons')

  def slow(scores: np.ndarray) -> float:
    h = scores[:, 0] - scores[:, 1]
    p, m = batch.preference.astype(np.float64), 0.7 * batch.margin.astype(np.float64)
    nll = -p * numerical.log_sigmoid(h - m) - (1 - p) * numerical.log_sigmoid(-h - m)
    return float((nll + 0.01 * scores.sum(-1) ** 2).sum())

  mean, metrics, slopes = tabular.evaluator(config, tabular.DIRECT)(outputs, batch)
  np.testing.assert_allclose(mean.total, slow(outputs['scores'].astype(np.float64)), rtol=1e-5)
  assert mean.weight == len(outputs['scores'])
  np.testing.assert_allclose(
    slopes['scores'], numerical.gradient(slow, outputs['scores']), rtol=1e-4, atol=1e-6
  )
  np.testing.assert_allclose(
    metrics['chosen_score'].value(), outputs['scores'][:, 0].mean(), rtol=1e-5
  )
  centring = (outputs['scores'].sum(-1) ** 2).mean()
  np.testing.assert_allclose(metrics['centring'].value(), centring, rtol=1e-5)


def test_accuracy_counts_predicted_ties_half_and_leaves_labelled_ties_out() -> None:
  """Right, wrong, a predicted tie, and a labelled tie: (1 + 0 + 1/2) / 3; a reversed label too."""
  metrics = quick.jit(preference_metrics)(
    jnp.array([2.0, -1.0, 0.0, 5.0]), jnp.array([1.0, 0.9, 1.0, 0.5])
  )
  np.testing.assert_allclose(metrics['accuracy'].value(), 0.5)
  assert metrics['accuracy'].weight == 3
  reversed_labels = quick.jit(preference_metrics)(jnp.array([-2.0, 3.0]), jnp.array([0.0, 0.2]))
  assert reversed_labels['accuracy'].value() == 0.5


def test_log_loss_of_soft_labels() -> None:
  """Cross-entropy against the labelled probability; log 2 at a difference of 0."""
  difference, preference = np.array([0.0, 2.0, -1.0]), np.array([1.0, 0.5, 0.25])
  expected = -preference * numerical.log_sigmoid(difference) - (
    1 - preference
  ) * numerical.log_sigmoid(-difference)
  metrics = quick.jit(preference_metrics)(jnp.asarray(difference), jnp.asarray(preference))
  np.testing.assert_allclose(metrics['log_loss'].value(), expected.mean(), rtol=1e-6)
  np.testing.assert_allclose(expected[0], np.log(2))


def test_integer_scores_are_refused() -> None:
  """And so are labels that were read as integers, and scores of the wrong shape."""
  ones, scores = jnp.ones(3), jnp.zeros((3, 2))
  with pytest.raises(ShapeError, match='scores: expected a floating-point array'):
    bradley_terry(scores.astype(int), ones, ones, margin_coefficient=0.0)
  with pytest.raises(ShapeError, match='preference: expected a floating-point array'):
    bradley_terry(scores, ones.astype(int), ones, margin_coefficient=0.0)
  with pytest.raises(ShapeError, match='scores: axis 2'):
    bradley_terry(jnp.zeros((3, 3)), ones, ones, margin_coefficient=0.0)


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('margin_coefficient', -1.0),
    ('center_coefficient', float('nan')),
    ('normalization', 'zscore'),
    ('normalization_samples', 1),
  ],
)
def test_impossible_settings_are_named(field: str, value: Any) -> None:
  """The error has the field's dotted name."""
  with pytest.raises(ConfigError) as error:
    RewardModelConfig(**{field: value}).validate('objective')
  assert error.value.field == f'objective.{field}'
  RewardModelConfig().validate('objective')
