"""REINFORCE++ against Hu et al. 2025, section 3, worked token by token in float64 NumPy."""

from typing import Any

import numpy as np
import pytest

from rlhf_jax.objectives.kl_penalty import KLPenaltyConfig
from rlhf_jax.objectives.reinforce_pp import ReinforcePPConfig
from tests.objectives import tabular
from tests.objectives.samples import SCORES, collect, make_experience, token_kls, whitened
from tests.objectives.settings import assert_refused
from tests.objectives.tabular import assert_equals_slow_loss, make_batch, make_outputs

BETA = 0.3
PENALTY = KLPenaltyConfig(coefficient=BETA)


def slow_advantages(config: ReinforcePPConfig, experience: Any) -> np.ndarray:
  """Rewards, discounted returns, and whitening over all tokens, `[N, R]`."""
  mask = experience.sequences.response_mask
  scores = SCORES.astype(np.float64)
  if config.group_baseline:
    groups = scores.reshape(-1, config.samples)
    scores = np.concatenate([group - group.mean() for group in groups])
  returns = np.zeros(mask.shape)
  kls = token_kls(experience) * (0.0 if config.kl_in_loss else BETA)
  for b, t in np.argwhere(mask):
    tokens = np.flatnonzero(mask[b])
    for k in tokens[tokens >= t]:
      reward = -kls[b, k] + (scores[b] if k == tokens[-1] else 0.0)
      returns[b, t] += config.gamma ** (k - t) * reward
  advantages = np.zeros(mask.shape)
  centred = returns[mask] - returns[mask].mean()
  advantages[mask] = whitened(returns[mask]) if config.scale else centred
  return advantages


CONFIGS = {
  'default': ReinforcePPConfig(kl=PENALTY),
  'discounted': ReinforcePPConfig(kl=PENALTY, gamma=0.8),
  'not scaled': ReinforcePPConfig(kl=PENALTY, scale=False),
  'group baseline': ReinforcePPConfig(kl=PENALTY, samples=2, group_baseline=True),
  'kl in loss': ReinforcePPConfig(kl=PENALTY, samples=4, group_baseline=True, kl_in_loss=True),
}


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize('bad', [0.0, np.nan])
def test_advantages_are_whitened_returns(config: ReinforcePPConfig, bad: float) -> None:
  """Over the tokens of all responses together; nothing behind their ends is read."""
  experience = make_experience(bad)
  batch, carry, metrics = collect(config, experience)
  expected = slow_advantages(config, experience)
  np.testing.assert_allclose(batch.advantages, expected, rtol=1e-4, atol=1e-5)
  objective = (SCORES - BETA * token_kls(experience).sum(1)).mean()
  np.testing.assert_allclose(metrics['objective'], objective, rtol=1e-5)
  np.testing.assert_allclose(carry['kl_coefficient'], BETA)


@pytest.mark.parametrize('kl_in_loss', [False, True])
@pytest.mark.parametrize('normalization', ['token', 'sequence'])
def test_the_loss_is_ppos(kl_in_loss: bool, normalization: str) -> None:
  """-min(rho A, clip(rho) A), plus beta k2 where the penalty is in the loss; and gradients.

  Mean over all tokens, or over each response and then over responses.
  """
  batch, outputs = make_batch('rollouts'), make_outputs('rollouts')
  config = ReinforcePPConfig(kl=PENALTY, kl_in_loss=kl_in_loss, loss_normalization=normalization)

  def slow(x: dict[str, np.ndarray]) -> float:
    rows: list[list[float]] = [[] for _ in batch.advantages]
    for b, t in np.argwhere(batch.sequences.response_mask):
      ratio = np.exp(x['logprobs'][b, t] - batch.old_logprobs[b, t])
      advantage = batch.advantages[b, t]
      clipped = min(max(ratio, 0.8), 1.2)
      k2 = 0.5 * (x['logprobs'][b, t] - batch.reference_logprobs[b, t]) ** 2
      rows[b].append(-min(ratio * advantage, clipped * advantage) + BETA * kl_in_loss * k2)
    means = [np.mean(row) for row in rows]
    return float(np.mean(means if normalization == 'sequence' else np.concatenate(rows)))

  assert_equals_slow_loss(config, batch, outputs, slow, 'logprobs')
  mean, metrics, _ = tabular.evaluator(config, tabular.DIRECT)(outputs, batch)
  same = np.isclose(mean.value(), metrics['policy_loss'].value())
  assert same == (not kl_in_loss)


@pytest.mark.parametrize(
  ('settings', 'field'),
  [
    ({'samples': 0}, 'samples'),
    ({'group_baseline': True}, 'samples'),
    ({'epochs': 0}, 'epochs'),
    ({'minibatches': 0}, 'minibatches'),
    ({'clip': 0.0}, 'clip'),
    ({'dual_clip': 1.2}, 'dual_clip'),
    ({'gamma': 1.1}, 'gamma'),
    ({'loss_normalization': 'constant'}, 'loss_normalization'),
    ({'kl': KLPenaltyConfig(target=-1.0)}, 'kl.target'),
    ({'kl': KLPenaltyConfig(target=6.0), 'kl_in_loss': True}, 'kl.target'),
  ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], field: str) -> None:
  """A group of one is its own baseline; the controller steers what is in the rewards."""
  assert_refused(ReinforcePPConfig, settings, field)
