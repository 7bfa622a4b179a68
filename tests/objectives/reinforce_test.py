"""REINFORCE and its baselines, worked in float64 NumPy."""

from typing import Any

import numpy as np
import pytest

from rlhf_jax.objectives.kl_penalty import KLPenaltyConfig
from rlhf_jax.objectives.reinforce import ReinforceConfig
from tests.objectives.samples import SCORES, collect, make_experience, token_kls
from tests.objectives.settings import assert_refused
from tests.objectives.tabular import assert_equals_slow_loss, make_batch, make_outputs

BETA = 0.3
PENALTY = KLPenaltyConfig(coefficient=BETA)


def rewards_of(experience: Any) -> np.ndarray:
  """Scores less beta times the KL of the response."""
  return SCORES - BETA * token_kls(experience).sum(1)


def advantages_of(batch: Any) -> np.ndarray:
  """One a response; behind its end 0."""
  mask = batch.sequences.response_mask
  advantages = np.asarray(batch.advantages)
  np.testing.assert_array_equal(advantages, np.where(mask, advantages[:, :1], 0.0))
  return advantages[:, 0]


def test_without_a_baseline_rewards_are_advantages() -> None:
  """The penalised ones."""
  experience = make_experience(np.nan)
  batch, _, metrics = collect(ReinforceConfig(baseline='none', kl=PENALTY), experience)
  np.testing.assert_allclose(advantages_of(batch), rewards_of(experience), rtol=1e-5)
  np.testing.assert_allclose(metrics['baseline'], 0.0, atol=1e-6)


def test_the_batch_baseline_is_the_mean_of_the_others() -> None:
  """So that no response is part of its own baseline."""
  experience = make_experience()
  batch, _, _ = collect(ReinforceConfig(baseline='batch', kl=PENALTY), experience)
  rewards = rewards_of(experience)
  others = [np.mean(np.delete(rewards, i)) for i in range(4)]
  np.testing.assert_allclose(advantages_of(batch), rewards - others, rtol=1e-5)


def test_the_moving_average_is_of_the_iterations_before() -> None:
  """It starts as the first iteration's mean, and keeps a share of itself from then on."""
  config = ReinforceConfig(kl=PENALTY, baseline_decay=0.8)
  experience = make_experience()
  first = rewards_of(experience)
  batch, carry, metrics = collect(config, experience)
  np.testing.assert_allclose(advantages_of(batch), first - first.mean(), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(carry['baseline'], first.mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics['baseline'], first.mean(), rtol=1e-5)
  better = experience.replace(scores=SCORES + 3)
  batch, following, _ = collect(config, better, **carry)
  np.testing.assert_allclose(advantages_of(batch), first + 3 - first.mean(), rtol=1e-5)
  expected = 0.8 * first.mean() + 0.2 * (first.mean() + 3)
  np.testing.assert_allclose(following['baseline'], expected, rtol=1e-5)


def test_a_baseline_of_zero_is_a_baseline() -> None:
  """A moving average that happens to be 0 is not taken for one that has not begun."""
  config = ReinforceConfig(kl=PENALTY)
  experience = make_experience()
  batch, _, _ = collect(config, experience, baseline=0.0, started=1.0)
  np.testing.assert_allclose(advantages_of(batch), rewards_of(experience), rtol=1e-5)


def test_the_loss_is_the_mean_over_responses() -> None:
  """-A times the sum of the response's log-probs (Williams 1992); values and gradients."""
  batch, outputs = make_batch('rollouts'), make_outputs('rollouts')

  def slow(x: dict[str, np.ndarray]) -> float:
    losses = [
      -batch.advantages[b, 0] * x['logprobs'][b][mask].sum()
      for b, mask in enumerate(batch.sequences.response_mask)
    ]
    return float(np.mean(losses))

  assert_equals_slow_loss(ReinforceConfig(), batch, outputs, slow, 'logprobs')


@pytest.mark.parametrize(
  ('settings', 'field'),
  [
    ({'baseline': 'value'}, 'baseline'),
    ({'baseline_decay': 1.0}, 'baseline_decay'),
    ({'baseline_decay': -0.1}, 'baseline_decay'),
    ({'kl': KLPenaltyConfig(horizon=0)}, 'kl.horizon'),
  ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], field: str) -> None:
  """A decay of 1 would keep the first baseline for ever."""
  assert_refused(ReinforceConfig, settings, field)
