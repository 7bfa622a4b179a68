"""KTO against Ethayarajh et al. 2024, eq. 8, worked in float64 NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.checks import ShapeError
from rlhf_jax.objectives.kto import KTOConfig, kto, prepare
from tests import quick
from tests.objectives import tabular
from tests.objectives.settings import assert_refused
from tests.objectives.tabular import (
  TABLES,
  assert_equals_slow_loss,
  make_batch,
  make_outputs,
  make_tables,
)

CONFIG = KTOConfig(beta=0.4, desirable_weight=1.3, undesirable_weight=0.7)


def sigmoid(x: float) -> float:
  """As in the paper."""
  return 1 / (1 + np.exp(-x))


def slow(config: KTOConfig, batch: Any, logprobs: np.ndarray) -> float:
  """Row by row: lambda_y - v(x, y), over rows that say something."""
  ratings, losses = batch.ratings, []
  for b, score in enumerate(ratings.score):
    mask = ratings.sequences.response_mask[b]
    logratio = sum((logprobs[b] - ratings.reference_logprobs[b].astype(np.float64))[mask])
    z = float(batch.reference_point[b])
    if score > config.threshold:
      losses.append(config.desirable_weight * (1 - sigmoid(config.beta * (logratio - z))))
    elif score < config.threshold:
      losses.append(config.undesirable_weight * (1 - sigmoid(config.beta * (z - logratio))))
  return float(np.mean(losses))


@pytest.mark.parametrize('threshold', [0.0, 0.2])
def test_the_loss_equals_equation_8(threshold: float) -> None:
  """Mean over desirable and undesirable responses; one rated at the threshold says nothing."""
  batch, outputs = make_batch('referenced_ratings'), make_outputs('referenced_ratings')
  config = KTOConfig(beta=0.4, desirable_weight=1.3, undesirable_weight=0.7, threshold=threshold)
  assert_equals_slow_loss(
    config, batch, outputs, lambda x: slow(config, batch, x['logprobs']), 'logprobs'
  )
  mean, metrics, slopes = tabular.evaluator(config, tabular.DIRECT)(outputs, batch)
  silent = batch.ratings.score == threshold
  assert mean.weight == (~silent).sum()
  np.testing.assert_array_equal(np.asarray(slopes['logprobs'])[silent], 0.0)
  desirable = batch.ratings.score > threshold
  np.testing.assert_allclose(metrics['desirable'].value(), desirable.mean())


def test_the_reference_point_is_of_mismatched_prompts() -> None:
  """Row i's prompt before row i + 1's response: the batch's mean log-ratio, not below 0."""
  ratings = make_batch('ratings')
  params, reference = make_tables(1), make_tables(5)
  rows, points = ratings.sequences, []

  def logprobs(tables: Any, prompt: int, response: int) -> np.ndarray:
    places = np.arange(rows.response.shape[1])
    before = np.concatenate([rows.prompt[prompt, -1:], rows.response[response, :-1]])
    logits = np.asarray(tables['policy'], np.float64)[places, before]
    normal = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return normal[places, rows.response[response]]

  for b in range(len(rows.prompt)):
    following = (b + 1) % len(rows.prompt)
    ratio = logprobs(params, b, following) - logprobs(reference, b, following)
    points.append(ratio[rows.response_mask[following]].sum())
  expected = np.mean(points)
  run = quick.jit(lambda a, b, batch: prepare(CONFIG, TABLES, a, b, batch).reference_point)
  point, mirrored = run(params, reference, ratings), run(reference, params, ratings)
  signed = (expected, -expected)
  for found, value in zip((point, mirrored), signed, strict=True):
    np.testing.assert_allclose(found, np.full(4, max(value, 0.0)), rtol=1e-5, atol=1e-6)
  assert abs(expected) > 0.1
  np.testing.assert_array_equal(run(params, params, ratings), 0.0)


def test_no_gradient_flows_through_the_reference_point() -> None:
  """It is a constant of the step, in the batch and in the formula."""
  arguments = (jnp.zeros(2), jnp.array([True, False]))

  def total(z: Any) -> Any:
    return kto(*arguments, z, beta=0.4, desirable_weight=1.0, undesirable_weight=1.0).sum()

  gradient = quick.jit(jax.grad(total))(jnp.ones(2))
  np.testing.assert_array_equal(gradient, 0.0)


def test_gains_and_losses_are_valued_apart() -> None:
  """Each loss lies between 0 and its weight, and is half of it at the reference point."""
  logratios, desirable = jnp.array([-1e4, 2.0, 1e4] * 2), jnp.array([True] * 3 + [False] * 3)
  losses = kto(
    logratios, desirable, jnp.full(6, 2.0), beta=0.1, desirable_weight=2.0, undesirable_weight=3.0
  )
  np.testing.assert_allclose(losses, [2.0, 1.0, 0.0, 0.0, 1.5, 3.0], atol=1e-6)


def test_wrong_shapes_are_refused() -> None:
  """A reference point for every row."""
  weights = {'desirable_weight': 1.0, 'undesirable_weight': 1.0}
  with pytest.raises(ShapeError, match='z: axis B'):
    kto(jnp.zeros(3), jnp.ones(3, bool), jnp.zeros(2), beta=0.1, **weights)
  with pytest.raises(ShapeError, match='logratios: expected a floating-point array'):
    kto(jnp.zeros(3, int), jnp.ones(3, bool), jnp.zeros(3), beta=0.1, **weights)


@pytest.mark.parametrize('field', ['beta', 'desirable_weight', 'undesirable_weight'])
@pytest.mark.parametrize('value', [0.0, -1.0])
def test_impossible_settings_are_named(field: str, value: float) -> None:
  """The error has the field's dotted name."""
  assert_refused(KTOConfig, {field: value}, field)
