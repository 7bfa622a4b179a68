"""Reward-weighted imitation: the weights, and that their optimum is the optimal policy."""

from typing import Any

import numpy as np
import pytest

from rlhf_jax.objectives.tilted_bc import TiltedBCConfig
from rlhf_jax.objectives.weighted_bc import WeightedBCConfig
from tests.objectives import tabular
from tests.objectives.samples import SCORES, collect, make_experience
from tests.objectives.settings import assert_refused
from tests.objectives.tabular import make_batch, make_outputs


@pytest.mark.parametrize(('samples', 'temperature'), [(2, 1.0), (4, 0.3)])
def test_weights_are_those_of_the_optimum(samples: int, temperature: float) -> None:
  """exp(r / beta) over its mean within the prompt's samples; large rewards do not overflow."""
  config = TiltedBCConfig(samples=samples, temperature=temperature)
  experience = make_experience()
  batch, carry, metrics = collect(config, experience)
  groups = np.exp(SCORES.astype(np.float64) / temperature).reshape(-1, samples)
  weights = groups / groups.mean(-1, keepdims=True)
  np.testing.assert_allclose(batch.score, weights.reshape(-1), rtol=1e-5)
  np.testing.assert_array_equal(batch.sequences.response, experience.sequences.response)
  shares = weights / samples
  np.testing.assert_allclose(
    metrics['effective_samples'], (1 / np.square(shares).sum(-1)).mean(), rtol=1e-5
  )
  assert carry == {}
  huge, _, _ = collect(config, make_experience(scores=np.float32(1e4) * SCORES))
  assert np.isfinite(huge.score).all() and huge.score.max() == samples


def test_what_is_weighted_is_imitated() -> None:
  """The loss is that of weighted behaviour cloning; values and gradients."""
  batch, outputs = make_batch('ratings'), make_outputs('ratings')
  ours, slopes = tabular.direct_loss(TiltedBCConfig(), outputs, batch)
  expected, expected_slopes = tabular.direct_loss(WeightedBCConfig(), outputs, batch)
  assert ours == expected
  np.testing.assert_array_equal(slopes['logprobs'], expected_slopes['logprobs'])


def test_the_optimal_policy_has_no_gradient() -> None:
  """Over all responses of a tiny space, weighed as in the optimum, the best policy is pi* itself.

  Four responses of one token, sampled as often as the reference has them, reward r: the gradient of
  the loss by the logits is pi - pi*, which is 0 at pi* ~ pi_ref exp(r / beta).
  """
  counts, rewards, beta = np.array([1, 2, 4, 1]), np.array([0.5, -1.0, 0.2, 2.0]), 0.7
  optimum = counts * np.exp(rewards / beta)
  optimum /= optimum.sum()
  rows = np.repeat(np.arange(4), counts)
  weights = np.exp(rewards[rows] / beta)
  weights *= len(rows) / weights.sum()
  gradient = np.mean(weights[:, None] * (optimum - np.eye(4)[rows]), axis=0)
  np.testing.assert_allclose(gradient, 0.0, atol=1e-12)


@pytest.mark.parametrize(
  ('settings', 'field'),
  [
    ({'samples': 1}, 'samples'),
    ({'temperature': 0.0}, 'temperature'),
    ({'epochs': 0}, 'epochs'),
    ({'minibatches': 0}, 'minibatches'),
  ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], field: str) -> None:
  """One sample has nothing to be weighed against."""
  assert_refused(TiltedBCConfig, settings, field)
