"""SimPO against Meng et al. 2024, eq. 6, worked in float64 NumPy."""

from typing import Any

import numpy as np
import pytest

from rlhf_jax.objectives.simpo import SimPOConfig, difference
from tests.objectives import tabular
from tests.objectives.settings import assert_refused
from tests.objectives.tabular import assert_equals_slow_loss, make_batch, make_outputs


def mean_logprobs(batch: Any, logprobs: np.ndarray) -> np.ndarray:
  """`[B, 2]`: the mean log-prob of each response's tokens."""
  mask = batch.sequences.response_mask
  means = [logprobs[index][mask[index]].mean() for index in np.ndindex(*mask.shape[:2])]
  return np.array(means).reshape(mask.shape[:2])


def slow(config: SimPOConfig, batch: Any, logprobs: np.ndarray) -> float:
  """Pair by pair."""
  losses = []
  for (first, second), p in zip(mean_logprobs(batch, logprobs), batch.preference, strict=True):
    reward = {1: config.beta * first, 2: config.beta * second}

    def verdict(won: float, lost: float) -> float:
      margin = won - lost - config.gamma
      if config.variant == 'hinge':
        return max(0.0, 1 - margin)
      e = config.label_smoothing
      return (1 - e) * np.log(1 + np.exp(-margin)) + e * np.log(1 + np.exp(margin))

    imitated = -first if p > 0.5 else -(first + second) / 2
    losses.append(
      p * verdict(reward[1], reward[2])
      + (1 - p) * verdict(reward[2], reward[1])
      + config.nll_coefficient * imitated
    )
  return float(np.mean(losses))


@pytest.mark.parametrize(
  'config',
  [
    SimPOConfig(),
    SimPOConfig(beta=2.5, gamma=0.3, label_smoothing=0.1, nll_coefficient=0.4),
    SimPOConfig(variant='hinge', gamma=0.5),
  ],
  ids=['default', 'smoothed, nll', 'hinge'],
)
def test_the_loss_equals_equation_6(config: SimPOConfig) -> None:
  """Hard and soft labels and a tie, values and gradients."""
  batch, outputs = make_batch('comparisons'), make_outputs('comparisons')
  assert_equals_slow_loss(
    config, batch, outputs, lambda x: slow(config, batch, x['logprobs']), 'logprobs'
  )


def test_length_does_not_matter() -> None:
  """A response that says a token's log-prob twice as often has the same reward."""
  batch, outputs = make_batch('comparisons'), make_outputs('comparisons')
  even = outputs | {'logprobs': np.full_like(outputs['logprobs'], -1.5)}
  config = SimPOConfig(gamma=0.0)
  loss, _ = tabular.direct_loss(config, even, batch)
  np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
  np.testing.assert_allclose(difference(config, tabular.DIRECT, even, batch), 0.0, atol=1e-6)


def test_the_margin_keeps_pushing_a_pair_that_is_won() -> None:
  """At a difference of gamma the gradient is half the full one: beta / (2 length) each."""
  batch, outputs = make_batch('comparisons'), make_outputs('comparisons')
  batch = batch.replace(preference=np.ones(4, np.float32))
  mask = batch.sequences.response_mask
  config = SimPOConfig(beta=2.0, gamma=1.0)
  means = np.array([-1.0, -1.5])  # a difference of 1 in rewards
  at_margin = outputs | {'logprobs': np.broadcast_to(means[:, None], mask.shape).astype('float32')}
  _, slopes = tabular.direct_loss(config, at_margin, batch)
  lengths = mask.sum(-1, keepdims=True)
  expected = np.array([-1.0, 1.0])[:, None] * config.beta * 0.5 / lengths / len(mask)
  np.testing.assert_allclose(slopes['logprobs'], np.where(mask, expected, 0.0), rtol=1e-5)


def test_metrics_are_rewards() -> None:
  """beta times mean log-probs, and accuracy over undecided labels."""
  batch, outputs = make_batch('comparisons'), make_outputs('comparisons')
  _, metrics, _ = tabular.evaluator(SimPOConfig(), tabular.DIRECT)(outputs, batch)
  rewards = 2.0 * mean_logprobs(batch, outputs['logprobs'].astype(np.float64))
  margin = rewards[:, 0] - rewards[:, 1]
  for name, expected in {
    'chosen_implicit_reward': rewards[:, 0].mean(),
    'rejected_implicit_reward': rewards[:, 1].mean(),
    'implicit_reward_margin': margin.mean(),
    'accuracy': (margin > 0)[batch.preference != 0.5].mean(),
  }.items():
    np.testing.assert_allclose(metrics[name].value(), expected, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
  ('settings', 'field'),
  [
    ({'beta': 0.0}, 'beta'),
    ({'gamma': -0.1}, 'gamma'),
    ({'variant': 'ipo'}, 'variant'),
    ({'label_smoothing': 0.5}, 'label_smoothing'),
    ({'label_smoothing': 0.1, 'variant': 'hinge'}, 'label_smoothing'),
    ({'nll_coefficient': -1.0}, 'nll_coefficient'),
    ({'nll_normalization': 'batch'}, 'nll_normalization'),
  ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], field: str) -> None:
  """The error has the field's dotted name."""
  assert_refused(SimPOConfig, settings, field)
