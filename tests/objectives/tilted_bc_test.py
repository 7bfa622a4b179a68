"""Reward-weighted imitation: the weights, and how near their optimum is to the optimal policy."""

import itertools
from typing import Any

import numpy as np
import pytest

from rlhf_jax.common.types import Experience, Sequences
from rlhf_jax.objectives.tilted_bc import TiltedBCConfig
from rlhf_jax.objectives.weighted_bc import WeightedBCConfig
from tests.objectives import batches, tabular
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


# A space of responses of one token: how many of the reference's samples each is, and its reward.
COUNTS, REWARDS, BETA = np.array([1, 2, 4, 1]), np.array([0.5, -1.0, 0.2, 2.0]), 0.7
DRAWS = np.repeat(np.arange(4), COUNTS)


def shares(weights: np.ndarray) -> np.ndarray:
  """`[4]`: of all the weight, that of each response."""
  return weights / weights.sum()


OPTIMUM = shares(COUNTS * np.exp(REWARDS / BETA))


def gradient(groups: np.ndarray, policy: np.ndarray) -> np.ndarray:
  """By the logits of the four responses, at a policy, of the loss of samples `[prompts, samples]`.

  Through `collect` and `loss`, of a table in which all prompts are the same.
  """
  config = TiltedBCConfig(samples=groups.shape[1], temperature=BETA)
  responses = groups.reshape(-1, 1)
  real, zeros = np.ones(responses.shape, bool), np.zeros(responses.shape, np.float32)
  experience = Experience(
    sequences=Sequences(np.zeros_like(responses), real, responses, real),
    old_logprobs=zeros,
    reference_logprobs=zeros,
    scores=REWARDS[groups.reshape(-1)].astype(np.float32),
  )
  batch, _, _ = collect(config, experience)
  logits = np.full((1, batches.VOCAB, batches.VOCAB), -1e4, np.float32)
  logits[0, 0, :4] = np.log(policy)
  tables = {**tabular.make_tables(length=1), 'policy': logits}
  mean, _, slopes = tabular.evaluator(config, tabular.TABLES)(tables, batch)
  return np.asarray(slopes['policy'])[0, 0, :4] / mean.weight


def test_the_optimal_policy_has_no_gradient() -> None:
  """The reference's samples in the shares that it gives them: the best policy is pi* itself.

  The gradient by the logits is pi - pi*: 0 at pi* ~ pi_ref exp(r / beta), and not elsewhere.
  """
  groups = DRAWS[None]
  np.testing.assert_allclose(gradient(groups, OPTIMUM), 0.0, atol=1e-5)
  for policy in (COUNTS / COUNTS.sum(), np.full(4, 0.25), OPTIMUM[::-1]):
    found = gradient(groups, policy)
    np.testing.assert_allclose(found, policy - OPTIMUM, atol=1e-5)
    assert np.abs(found).max() > 0.05


def test_few_samples_make_a_flatter_optimum() -> None:
  """Over all groups of so many of the reference's samples, each as likely as it is.

  The more samples, the nearer pi*; with few the best policy is between it and the reference.
  """
  gains = []
  for samples in (2, 3):
    groups = DRAWS[np.array(list(itertools.product(range(len(DRAWS)), repeat=samples)))]
    weights = np.exp(REWARDS[groups] / BETA)
    weights /= weights.sum(-1, keepdims=True)
    best = shares(np.bincount(groups.reshape(-1), weights.reshape(-1)))
    np.testing.assert_allclose(gradient(groups, best), 0.0, atol=1e-5)
    np.testing.assert_allclose(gradient(groups, OPTIMUM), OPTIMUM - best, atol=1e-5)
    gains.append(best @ REWARDS)
  assert COUNTS @ REWARDS / COUNTS.sum() < gains[0] < gains[1] < OPTIMUM @ REWARDS - 0.05


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
