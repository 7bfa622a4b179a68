"""PPO's loss, values and gradients, and its advantages, against float64 NumPy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.checks import ShapeError
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.objectives import ppo
from rlhf_jax.objectives.kl_penalty import KLPenaltyConfig
from rlhf_jax.objectives.ppo import PPOConfig
from tests import numerical, quick
from tests.objectives import samples, tabular

value_loss = jax.jit(ppo.value_loss, static_argnames='clip')

RNG = np.random.default_rng(0)
SHAPE = (5, 6)
OLD: Any = -2 + 0.5 * RNG.normal(0, 1, SHAPE)
NEW: Any = OLD + 0.4 * RNG.normal(0, 1, SHAPE)
ADVANTAGES: Any = RNG.normal(0, 1, SHAPE)
CLIP = 0.2


def slow_policy_loss(new: float, old: float, advantage: float) -> float:
  """-min(rho A, clip(rho) A) for one token (Schulman et al. 2017, eq. 7)."""
  ratio = np.exp(new - old)
  clipped = min(max(ratio, 1 - CLIP), 1 + CLIP)
  return -min(ratio * advantage, clipped * advantage)


def slow_value_loss(value: float, old: float, target: float) -> float:
  """Half the larger of the two squared errors, of the value and of the value kept near the old."""
  near = min(max(value, old - CLIP), old + CLIP)
  return 0.5 * max((value - target) ** 2, (near - target) ** 2)


def every(function: Any, *arrays: np.ndarray) -> np.ndarray:
  """The scalar function at every entry."""
  return np.vectorize(function, otypes=[np.float64])(*arrays)


def floats(*arrays: np.ndarray) -> list[jax.Array]:
  """As float32 arrays of jax."""
  return [jnp.asarray(array, jnp.float32) for array in arrays]


def test_value_loss_equals_openais() -> None:
  """Values and gradients, with moves within and beyond the clip, towards and past the target."""
  old, targets = RNG.normal(0, 1, (2, *SHAPE))
  values = old + RNG.normal(0, 0.4, SHAPE)
  assert (abs(values - old) > CLIP).any() and (abs(values - old) < CLIP).any()
  losses = value_loss(*floats(values, old, targets), clip=CLIP)
  np.testing.assert_allclose(
    losses, every(slow_value_loss, values, old, targets), rtol=1e-4, atol=1e-6
  )
  slopes = quick.jit(jax.grad(lambda x: value_loss(x, *floats(old, targets), clip=CLIP).sum()))(
    jnp.asarray(values, jnp.float32)
  )
  by_hand = numerical.gradient(lambda x: every(slow_value_loss, x, old, targets).sum(), values)
  np.testing.assert_allclose(slopes, by_hand, rtol=1e-3, atol=1e-5)


def test_value_loss_by_hand() -> None:
  """Old 0, target 1: at 0.1 half of 0.9^2; at 0.5 the clipped 0.2 counts, half of 0.8^2."""
  losses = value_loss(jnp.array([[0.1, 0.5]]), jnp.zeros((1, 2)), jnp.ones((1, 2)), clip=CLIP)
  np.testing.assert_allclose(losses, [[0.405, 0.32]], rtol=1e-6)


CONFIG = PPOConfig(value_coefficient=0.5)


def slow_loss(batch: Any, logprobs: Any, values: Any) -> float:
  """Policy terms over response tokens plus value terms over the value mask, token by token."""
  total = 0.0
  for index in np.ndindex(*logprobs.shape):
    if batch.sequences.response_mask[index]:
      total += slow_policy_loss(
        logprobs[index], float(batch.old_logprobs[index]), float(batch.advantages[index])
      )
    if batch.value_mask[index]:
      total += CONFIG.value_coefficient * slow_value_loss(
        values[index], float(batch.old_values[index]), float(batch.returns[index])
      )
  return total


def test_the_loss_sums_both_terms_over_their_masks() -> None:
  """The total, the number of response tokens as its weight, and both gradients."""
  batch, outputs = tabular.make_batch('valued_rollouts'), tabular.make_outputs('valued_rollouts')
  mean, _, slopes = tabular.evaluator(CONFIG, tabular.DIRECT)(outputs, batch)
  wide = {name: outputs[name].astype(np.float64) for name in ('logprobs', 'values')}
  np.testing.assert_allclose(mean.total, slow_loss(batch, **wide), rtol=1e-5)
  assert mean.weight == batch.sequences.response_mask.sum()
  for name, point in wide.items():

    def moved(x: np.ndarray, name: str = name) -> float:
      return slow_loss(batch, **(wide | {name: x}))

    expected = numerical.gradient(moved, point)
    np.testing.assert_allclose(slopes[name], expected, rtol=1e-3, atol=1e-5)
  beyond = batch.value_mask & ~batch.sequences.response_mask
  assert beyond.any() and (np.asarray(slopes['values'])[beyond] != 0).any()


def test_metrics_describe_how_far_the_policy_moved() -> None:
  """Clip fractions, half the mean squared log-ratio, mean and largest ratio, over their masks."""
  batch, outputs = tabular.make_batch('valued_rollouts'), tabular.make_outputs('valued_rollouts')
  _, metrics, _ = tabular.evaluator(CONFIG, tabular.DIRECT)(outputs, batch)
  values = {name: float(metric.value()) for name, metric in metrics.items()}
  mask = batch.sequences.response_mask
  logratio = (outputs['logprobs'] - batch.old_logprobs)[mask].astype(np.float64)
  ratio = np.exp(logratio)
  moved = abs(outputs['values'] - batch.old_values)[batch.value_mask]
  expected = {
    'clip_fraction': (abs(ratio - 1) > 0.2).mean(),
    'value_clip_fraction': (moved > 0.2).mean(),
    'approximate_kl': 0.5 * (logratio**2).mean(),
    'ratio': ratio.mean(),
    'ratio_max': ratio.max(),
    'first_ratio_deviation': abs(ratio - 1).max(),
    'entropy': outputs['entropy'][mask].mean(),
  }
  for name, value in expected.items():
    np.testing.assert_allclose(values[name], value, rtol=1e-5, err_msg=name)


def test_before_the_first_update_nothing_has_moved() -> None:
  """With the old log-probs and values themselves: ratio exactly 1, no KL, nothing clipped."""
  batch, outputs = tabular.make_batch('valued_rollouts'), tabular.make_outputs('valued_rollouts')
  outputs |= {'logprobs': batch.old_logprobs, 'values': batch.old_values}
  mean, metrics, _ = tabular.evaluator(CONFIG, tabular.DIRECT)(outputs, batch)
  values = {name: float(metric.value()) for name, metric in metrics.items()}
  assert values['ratio'] == values['ratio_max'] == 1.0
  for name in ('first_ratio_deviation', 'approximate_kl', 'clip_fraction', 'value_clip_fraction'):
    assert values[name] == 0.0
  mask = batch.sequences.response_mask
  errors = (batch.old_values - batch.returns)[batch.value_mask].astype(np.float64)
  expected = -batch.advantages[mask].sum() + CONFIG.value_coefficient * 0.5 * (errors**2).sum()
  np.testing.assert_allclose(mean.total, expected, rtol=1e-5)


def test_integer_returns_are_refused() -> None:
  """They would have been truncated somewhere before."""
  ones = jnp.ones((2, 3))
  with pytest.raises(ShapeError, match='returns: expected a floating-point array'):
    value_loss(ones, ones, ones.astype(int), clip=0.2)


def test_a_value_mask_of_another_shape_is_refused() -> None:
  """Before anything is computed."""
  batch = tabular.make_batch('valued_rollouts')
  wrong = dataclasses.replace(batch, value_mask=batch.value_mask[:, :-1])
  with pytest.raises(ShapeError, match='value_mask: axis R'):
    tabular.evaluator(CONFIG, tabular.DIRECT)(tabular.make_outputs('valued_rollouts'), wrong)


@pytest.mark.parametrize(
  ('settings', 'field'),
  [
    ({'epochs': 0}, 'epochs'),
    ({'minibatches': 0}, 'minibatches'),
    ({'gamma': 1.1}, 'gamma'),
    ({'lam': -0.1}, 'lam'),
    ({'clip': 0.0}, 'clip'),
    ({'value_clip': 0.0}, 'value_clip'),
    ({'value_coefficient': -1.0}, 'value_coefficient'),
    ({'kl': KLPenaltyConfig(target=6.0, coefficient=0.0)}, 'kl.coefficient'),
    ({'score_placement': 'first_token'}, 'score_placement'),
    ({'value_model': 'own'}, 'value_model'),
    ({'value_normalization': 'tokens'}, 'value_normalization'),
  ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], field: str) -> None:
  """The error has the field's dotted name."""
  with pytest.raises(ConfigError) as error:
    PPOConfig(**settings).validate('objective')
  assert error.value.field == f'objective.{field}'
  PPOConfig().validate('objective')


def slow_collect(config: PPOConfig, experience: Any) -> tuple[np.ndarray, np.ndarray]:
  """Advantages before whitening, and returns, of scores paid at the last token."""
  mask, kls = experience.sequences.response_mask, samples.token_kls(experience)
  advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
  for b in range(len(mask)):
    tokens, following = np.flatnonzero(mask[b]), 0.0
    for t in tokens[::-1]:
      reward = -config.kl.coefficient * kls[b, t]
      if t == tokens[-1]:
        reward += samples.SCORES[b]
      later = experience.values[b, t + 1] if t < tokens[-1] else 0.0
      delta = reward + config.gamma * later - experience.values[b, t]
      following = delta + config.gamma * config.lam * following
      advantages[b, t] = following
      returns[b, t] = following + experience.values[b, t]
  return advantages, returns


@pytest.mark.parametrize('unbiased', [False, True])
@pytest.mark.parametrize('bad', [0.0, np.nan])
def test_advantages_equal_the_slow_loop(unbiased: bool, bad: float) -> None:
  """GAE of penalised rewards (Schulman et al. 2016), whitened; nothing behind ends is read."""
  penalty = KLPenaltyConfig(coefficient=0.3)
  config = PPOConfig(gamma=0.9, lam=0.8, kl=penalty, unbiased_variance=unbiased)
  experience = samples.make_experience(bad)
  batch, carry, metrics = samples.collect(config, experience)
  advantages, returns = slow_collect(config, experience)
  mask = experience.sequences.response_mask
  kept = advantages[mask]
  expected = np.zeros(mask.shape)
  expected[mask] = (kept - kept.mean()) / kept.std(ddof=int(unbiased))
  np.testing.assert_allclose(batch.advantages, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(batch.returns, returns, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(batch.value_mask, mask)
  errors = returns[mask] - experience.values[mask]
  explained = 1 - errors.var() / returns[mask].var()
  np.testing.assert_allclose(metrics['explained_variance'], explained, rtol=1e-4)
  objective = (samples.SCORES - 0.3 * samples.token_kls(experience).sum(1)).mean()
  np.testing.assert_allclose(metrics['objective'], objective, rtol=1e-5)
  np.testing.assert_allclose(carry['kl_coefficient'], 0.3)


@pytest.mark.parametrize('unbiased', [False, True])
def test_whitened_rewards_keep_their_mean(unbiased: bool) -> None:
  """Unit variance over the steps that have a value; with lam = gamma = 0 they can be read off."""
  config = PPOConfig(
    gamma=0.0,
    lam=0.0,
    whiten_rewards=True,
    whiten_advantages=False,
    unbiased_variance=unbiased,
    score_placement='after_stop',
    kl=KLPenaltyConfig(coefficient=0.3),
  )
  experience = samples.make_experience()
  batch, _, _ = samples.collect(config, experience)
  mask = np.asarray(batch.value_mask)
  raw = -0.3 * samples.token_kls(experience)
  for b, end in enumerate(experience.sequences.response_mask.sum(1)):
    raw[b, min(end, mask.shape[1] - 1)] += samples.SCORES[b]
  kept = raw[mask]
  expected = (kept - kept.mean()) / kept.std(ddof=int(unbiased)) + kept.mean()
  np.testing.assert_allclose(np.asarray(batch.returns)[mask], expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(np.asarray(batch.returns)[~mask], 0.0)
