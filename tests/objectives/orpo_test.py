"""ORPO against Hong et al. 2024, eq. 4-7, worked in float64 NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives.orpo import MAX_MEAN_LOGPROB, ORPOConfig, difference, log_odds, orpo
from tests import quick
from tests.objectives import tabular
from tests.objectives.settings import assert_refused
from tests.objectives.simpo_test import mean_logprobs
from tests.objectives.tabular import assert_equals_slow_loss, make_batch, make_outputs


def slow_odds(mean: float) -> float:
  """odds = p / (1 - p) of the geometric mean of a response's token probabilities (eq. 4)."""
  return float(np.exp(mean) / (1 - np.exp(mean)))


def slow(lam: float, batch: Any, logprobs: np.ndarray) -> float:
  """Pair by pair."""
  losses = []
  for (first, second), p in zip(mean_logprobs(batch, logprobs), batch.preference, strict=True):
    ratio = slow_odds(first) / slow_odds(second)
    win, lose = -np.log(ratio / (1 + ratio)), -np.log(1 / (1 + ratio))
    imitated = -first if p > 0.5 else -(first + second) / 2
    losses.append(imitated + lam * (p * win + (1 - p) * lose))
  return float(np.mean(losses))


@pytest.mark.parametrize('lam', [0.1, 1.5])
def test_the_loss_equals_equation_6(lam: float) -> None:
  """Likelihood of the chosen and the odds-ratio term, values and gradients."""
  batch, outputs = make_batch('comparisons'), make_outputs('comparisons')
  assert_equals_slow_loss(
    ORPOConfig(lam=lam), batch, outputs, lambda x: slow(lam, batch, x['logprobs']), 'logprobs'
  )


def test_the_difference_is_the_log_odds_ratio() -> None:
  """So that its sigmoid is the probability in the loss."""
  batch, outputs = make_batch('comparisons'), make_outputs('comparisons')
  odds = np.vectorize(slow_odds)(mean_logprobs(batch, outputs['logprobs'].astype(np.float64)))
  found = difference(ORPOConfig(), tabular.DIRECT, outputs, batch)
  np.testing.assert_allclose(found, np.log(odds[:, 0] / odds[:, 1]), rtol=1e-5, atol=1e-6)


def test_log_odds_by_hand() -> None:
  """Even odds at 1/2, 1 to 3 at 1/4; near certainty they stop growing, and so does the gradient."""
  np.testing.assert_allclose(
    log_odds(jnp.log(jnp.array([0.5, 0.25]))), [0.0, -np.log(3)], atol=1e-6
  )
  slope = quick.jit(jax.grad(lambda x: log_odds(x).sum()))
  assert slope(jnp.array([MAX_MEAN_LOGPROB / 2])) == 0.0
  np.testing.assert_allclose(slope(jnp.log(jnp.array([0.5]))), 2.0, rtol=1e-6)  # 1 / (1 - p)


def test_equal_odds_lose_log_two() -> None:
  """Whatever they are, and whatever the label."""
  means = jnp.array([[-0.1, -0.1], [-3.0, -3.0]])
  np.testing.assert_allclose(orpo(means, jnp.array([1.0, 0.3])), np.log(2), rtol=1e-6)


@pytest.mark.parametrize(('settings', 'field'), [({'lam': 0.0}, 'lam'), ({'lam': -0.1}, 'lam')])
def test_impossible_settings_are_named(settings: dict[str, Any], field: str) -> None:
  """Without its term ORPO is SFT."""
  assert_refused(ORPOConfig, settings, field)
