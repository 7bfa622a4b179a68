"""RLOO against Ahmadian et al. 2024, section 3.3, worked in float64 NumPy."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.checks import ShapeError
from rlhf_jax.objectives.kl_penalty import KLPenaltyConfig
from rlhf_jax.objectives.rloo import RLOOConfig, leave_one_out
from tests.objectives import tabular
from tests.objectives.samples import SCORES, collect, make_experience, token_kls
from tests.objectives.settings import assert_refused
from tests.objectives.tabular import assert_equals_slow_loss, make_batch, make_outputs

BETA = 0.3


def slow_advantages(rewards: np.ndarray, samples: int) -> np.ndarray:
  """R_i minus the mean of the other responses to the same prompt."""
  advantages = []
  for i, reward in enumerate(rewards):
    first = i - i % samples
    others = [rewards[j] for j in range(first, first + samples) if j != i]
    advantages.append(reward - sum(others) / len(others))
  return np.array(advantages)


@pytest.mark.parametrize('samples', [2, 4])
@pytest.mark.parametrize('bad', [0.0, np.nan])
def test_advantages_leave_one_out(samples: int, bad: float) -> None:
  """Scores less beta times the KL of the response, less the others' mean; one for all tokens."""
  config = RLOOConfig(samples=samples, kl=KLPenaltyConfig(coefficient=BETA))
  experience = make_experience(bad)
  batch, carry, metrics = collect(config, experience)
  kls = token_kls(experience).sum(1)
  expected = slow_advantages(SCORES - BETA * kls, samples)
  mask = experience.sequences.response_mask
  np.testing.assert_allclose(
    batch.advantages, np.where(mask, expected[:, None], 0.0), rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(metrics['objective'], (SCORES - BETA * kls).mean(), rtol=1e-5)
  spread = SCORES.astype(np.float64).reshape(-1, samples).std(1).mean()
  np.testing.assert_allclose(metrics['group_std'], spread, rtol=1e-5)
  np.testing.assert_allclose(carry['kl_coefficient'], BETA)


def test_the_coefficient_is_steered() -> None:
  """From the one that was carried, by the KL of these samples."""
  config = RLOOConfig(samples=2, kl=KLPenaltyConfig(target=0.01, horizon=100))
  experience = make_experience()
  _, carry, metrics = collect(config, experience, kl_coefficient=0.7)
  error = np.clip(token_kls(experience).sum(1).mean() / 0.01 - 1, -0.2, 0.2)
  np.testing.assert_allclose(carry['kl_coefficient'], 0.7 * (1 + error * 4 / 100), rtol=1e-6)
  np.testing.assert_allclose(metrics['kl_coefficient'], 0.7)


def test_standardised_advantages() -> None:
  """Mean 0, and the deviation of the count less one, plus 1e-4, as in TRL."""
  config = RLOOConfig(samples=2, whiten_advantages=True, kl=KLPenaltyConfig(coefficient=0.0))
  advantages = np.asarray(collect(config, make_experience())[0].advantages)[:, 0]
  raw = slow_advantages(SCORES.astype(np.float64), 2)
  expected = (raw - raw.mean()) / (raw.std(ddof=1) + 1e-4)
  np.testing.assert_allclose(advantages, expected, rtol=1e-5)


def slow(config: RLOOConfig, batch: Any, logprobs: np.ndarray) -> float:
  """One term a response or a token: -min(rho A, clip(rho) A)."""
  losses = []
  for b, mask in enumerate(batch.sequences.response_mask):
    logratio = (logprobs[b] - batch.old_logprobs[b].astype(np.float64))[mask]
    advantage = batch.advantages[b, 0]
    for x in [logratio.sum()] if config.ratio == 'sequence' else logratio:
      ratio = np.exp(x)
      clipped = min(max(ratio, 1 - config.clip), 1 + config.clip)
      losses.append(-min(ratio * advantage, clipped * advantage))
  return float(np.mean(losses))


@pytest.mark.parametrize('ratio', ['sequence', 'token'])
def test_the_loss_clips_responses_or_tokens(ratio: str) -> None:
  """Values and gradients, some of them clipped."""
  batch, outputs = make_batch('rollouts'), make_outputs('rollouts')
  config = RLOOConfig(ratio=ratio, clip=0.2)
  assert_equals_slow_loss(
    config, batch, outputs, lambda x: slow(config, batch, x['logprobs']), 'logprobs'
  )
  _, metrics, _ = tabular.evaluator(config, tabular.DIRECT)(outputs, batch)
  assert 0 < metrics['clip_fraction'].value() < 1


def test_leave_one_out_by_hand() -> None:
  """Two responses: the difference, both ways; advantages of a prompt add up to 0."""
  np.testing.assert_allclose(leave_one_out(jnp.array([[3.0, 1.0]])), [[2.0, -2.0]])
  advantages = leave_one_out(jnp.array([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]]))
  np.testing.assert_allclose(advantages, [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]], atol=1e-6)
  with pytest.raises(ShapeError, match='rewards: expected a floating-point array'):
    leave_one_out(jnp.array([[3, 1]]))
  with pytest.raises(ValueError, match='1 response: a leave-one-out baseline takes at least 2'):
    leave_one_out(jnp.array([[3.0]]))


@pytest.mark.parametrize(
  ('settings', 'field'),
  [
    ({'samples': 1}, 'samples'),
    ({'epochs': 0}, 'epochs'),
    ({'minibatches': 0}, 'minibatches'),
    ({'clip': 0.0}, 'clip'),
    ({'ratio': 'word'}, 'ratio'),
    ({'kl': KLPenaltyConfig(coefficient=-1.0)}, 'kl.coefficient'),
  ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], field: str) -> None:
  """A group of one has no baseline."""
  assert_refused(RLOOConfig, settings, field)
