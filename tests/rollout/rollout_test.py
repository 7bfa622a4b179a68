"""Rollouts against a slow, row-by-row version that follows the code of Huang et al. 2024."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.common.checks import ShapeError
from rlhf_jax.common.types import PolicyOutput, Sequences
from rlhf_jax.objectives import PPOConfig
from rlhf_jax.rollout.rollout import Judges, Sampled, assemble
from tests import quick
from tests.objectives import tabular

RNG = np.random.default_rng(0)
B, R, V = 6, 5, 4
LENGTHS = [5, 3, 1, 4, 5, 2]
MASK: Any = np.arange(R) < np.array(LENGTHS)[:, None]
# Logits of policy and reference at every position, and values there; rows 0 and 4 never stopped.
LOGITS, REFERENCE = RNG.normal(0, 1, (2, B, R, V))
VALUES: Any = RNG.normal(0, 1, (B, R))
# Drawn from the policy, so that the estimated KL is positive.
TOKENS: Any = (LOGITS + RNG.gumbel(size=LOGITS.shape)).argmax(-1)
SCORES: Any = RNG.normal(0, 2, B)
STOPPED: Any = np.array([False, True, True, True, False, True])
BETA = 0.3


def normalised(logits: np.ndarray) -> np.ndarray:
  """Log-probabilities in float64."""
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def chosen(logits: np.ndarray) -> np.ndarray:
  """Log-probs of TOKENS."""
  return np.take_along_axis(normalised(logits), TOKENS[..., None], -1)[..., 0]


def make_judges(masked: float) -> Judges:
  """Judges that say `masked` of padding; params 1 is the policy, params 0 the reference."""

  def spoil(values: np.ndarray, mask: np.ndarray = MASK) -> Any:
    return jnp.asarray(np.where(mask, values, masked), jnp.float32)

  def policy(params: Any, sequences: Sequences) -> PolicyOutput:
    assert params == {'policy': 1}
    logprobs = spoil(chosen(LOGITS))
    # A value one step after the end is read where scores are paid after the stop.
    readable = np.arange(R) <= np.array(LENGTHS)[:, None]
    return PolicyOutput(logprobs, jnp.zeros((B, R)), spoil(VALUES, readable))

  def reference(params: Any, sequences: Sequences) -> PolicyOutput:
    assert params == 0
    return PolicyOutput(spoil(chosen(REFERENCE)), jnp.zeros((B, R)))

  def logits(params: Any, sequences: Sequences) -> Any:
    return spoil(LOGITS if params == 1 else REFERENCE, MASK[..., None])

  return Judges(policy, reference, logits)


def rollout(masked: float = 0.0, coefficient: float = BETA, **settings: Any) -> tuple[Any, ...]:
  """(rollouts, next coefficient, metrics as numbers) of the samples above."""
  sequences = Sequences(
    prompt=jnp.ones((B, 2), jnp.int32),
    prompt_mask=jnp.array([[False, True]] * 3 + [[True, True]] * 3),
    response=jnp.asarray(TOKENS),
    response_mask=jnp.asarray(MASK),
  )
  sampler_logprobs = jnp.asarray(np.where(MASK, chosen(LOGITS) + 1e-3, 7.0), jnp.float32)
  config, judges = PPOConfig(**settings), make_judges(masked)
  sampled = Sampled(sequences, sampler_logprobs, jnp.asarray(STOPPED))
  run = quick.jit(
    lambda beta, scores: assemble(config, judges, {'policy': 1}, 0, beta, sampled, scores)
  )
  rollouts, following, metrics = run(jnp.float32(coefficient), jnp.asarray(SCORES, jnp.float32))
  return rollouts, float(following), metrics_lib.values(metrics)


def whiten(values: np.ndarray, mask: np.ndarray, shift_mean: bool) -> np.ndarray:
  """`masked_whiten` of that code, with its biased variance."""
  kept = values[mask]
  whitened = (values - kept.mean()) / np.sqrt(((kept - kept.mean()) ** 2).mean() + 1e-8)
  return whitened if shift_mean else whitened + kept.mean()


def slow_rollout(config: PPOConfig) -> tuple[np.ndarray, np.ndarray]:
  """Advantages and returns, in the order of that code's steps 3 to 6, in float64.

  3. scores of responses without a stop; 4. rewards, the score paid after the stop; 5. whiten
  rewards; 6. advantages and returns over all columns, masked values being 0.
  """
  scores = np.where(STOPPED, SCORES, -1.0) if config.missing_stop == 'replace' else SCORES
  sequence_lengths = np.array(LENGTHS) - 1
  padding_mask = np.arange(R) > sequence_lengths[:, None]
  padding_mask_p1 = np.arange(R) > sequence_lengths[:, None] + 1
  values = np.where(padding_mask_p1, 0.0, VALUES)
  kl = np.where(padding_mask, 0.0, chosen(LOGITS) - chosen(REFERENCE))
  rewards = -BETA * kl
  for b in range(B):
    end = sequence_lengths[b] + 1 if sequence_lengths[b] + 1 < R else sequence_lengths[b]
    rewards[b, end] += scores[b]
  if config.whiten_rewards:
    rewards = whiten(rewards, ~padding_mask_p1, shift_mean=False)
    rewards[padding_mask_p1] = 0.0
  advantages = np.zeros((B, R))
  for b in range(B):
    last = 0.0
    for t in reversed(range(R)):
      following = values[b, t + 1] if t < R - 1 else 0.0
      delta = rewards[b, t] + config.gamma * following - values[b, t]
      advantages[b, t] = last = delta + config.gamma * config.lam * last
  returns = advantages + values
  if config.whiten_advantages:
    advantages = whiten(advantages, ~padding_mask, shift_mean=True)
  return np.where(padding_mask, 0.0, advantages), np.where(padding_mask_p1, 0.0, returns)


@pytest.mark.parametrize(
  'settings',
  [
    {},
    {'missing_stop': 'replace', 'whiten_rewards': True},
    {'gamma': 0.9, 'lam': 0.8, 'whiten_advantages': False},
  ],
  ids=['default', 'replace, whitened', 'discounted'],
)
def test_advantages_and_returns_equal_the_released_code(settings: dict[str, Any]) -> None:
  """Scores after the stop, with and without each option, over ragged rows."""
  settings = {'score_placement': 'after_stop', **settings}
  rollouts, _, _ = rollout(masked=5.0, **settings)
  advantages, returns = slow_rollout(PPOConfig(**settings))
  np.testing.assert_allclose(rollouts.advantages, advantages, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(rollouts.returns, returns, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(rollouts.old_values[MASK], VALUES[MASK], rtol=1e-6)
  assert rollouts.advantages.dtype == rollouts.returns.dtype == jnp.float32


@pytest.mark.parametrize('placement', ['last_token', 'after_stop'])
def test_what_is_said_of_padding_does_not_matter(placement: str) -> None:
  """nan log-probs, values and logits behind the end give the same rollout and metrics."""
  settings: dict[str, Any] = {
    'score_placement': placement,
    'whiten_rewards': True,
    'exact_kl': True,
    'kl_target': 1.0,
  }
  clean, following, numbers = rollout(**settings)
  dirty, dirty_following, dirty_numbers = rollout(masked=np.nan, **settings)
  assert dirty_following == following and dirty_numbers == numbers
  for name in ('advantages', 'returns', 'value_mask'):
    np.testing.assert_array_equal(getattr(dirty, name), getattr(clean, name))


def test_whitened_advantages_have_mean_0_and_variance_1_over_tokens() -> None:
  """Over response tokens alone, even where the value mask is longer; biased variance."""
  rollouts, _, _ = rollout(score_placement='after_stop')
  kept = np.asarray(rollouts.advantages)[MASK]
  np.testing.assert_allclose([kept.mean(), kept.var()], [0.0, 1.0], atol=1e-5)
  np.testing.assert_array_equal(np.asarray(rollouts.advantages)[~MASK], 0.0)


def test_undiscounted_returns_are_scores_less_the_penalty() -> None:
  """With gamma = lam = 1 the first return is score - beta x the response's summed log-ratio."""
  rollouts, _, metrics = rollout(gamma=1.0, lam=1.0)
  kl = np.where(MASK, chosen(LOGITS) - chosen(REFERENCE), 0).sum(1)
  np.testing.assert_allclose(rollouts.returns[:, 0], SCORES - BETA * kl, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(metrics['objective'], (SCORES - BETA * kl).mean(), rtol=1e-5)


def test_metrics_by_hand() -> None:
  """Sequence KLs are sums over a response averaged over responses; the rest likewise."""
  rollouts, _, metrics = rollout(missing_stop='replace', exact_kl=True)
  log_ratio = chosen(LOGITS) - chosen(REFERENCE)
  p, q = normalised(LOGITS), normalised(REFERENCE)
  exact = (np.exp(p) * (p - q)).sum(-1)
  expected = {
    'kl': np.where(MASK, log_ratio, 0).sum(1).mean(),
    'kl_k3': np.where(MASK, np.exp(-log_ratio) - 1 + log_ratio, 0).sum(1).mean(),
    'exact_kl': np.where(MASK, exact, 0).sum(1).mean(),
    'score': np.where(STOPPED, SCORES, -1.0).mean(),
    'length': np.mean(LENGTHS),
    'stopped': STOPPED.mean(),
    'kl_coefficient': BETA,
    'sampler_logprob_error': 1e-3,
    'tokens': 3 * 1 + 3 * 2 + sum(LENGTHS),
    'values': VALUES[MASK].mean(),
    'returns': np.asarray(rollouts.returns)[MASK].mean(),
  }
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-3, err_msg=name)


def test_explained_variance() -> None:
  """1 - Var[return - value] / Var[return] over the steps that have a value."""
  rollouts, _, metrics = rollout(score_placement='after_stop')
  mask = np.asarray(rollouts.value_mask)
  returns = np.asarray(rollouts.returns, np.float64)[mask]
  values = np.asarray(rollouts.old_values, np.float64)[mask]
  expected = 1 - (returns - values).var() / returns.var()
  np.testing.assert_allclose(metrics['explained_variance'], expected, rtol=1e-4)


def test_an_untouched_policy_has_no_divergence() -> None:
  """Policy = reference: every KL is 0 and rewards are the scores alone."""
  judges = make_judges(0.0)
  same = judges._replace(reference=lambda params, rows: judges.policy({'policy': 1}, rows))
  sequences = Sequences(jnp.ones((B, 1), int), jnp.ones((B, 1), bool), jnp.asarray(TOKENS), MASK)
  sampled = Sampled(sequences, jnp.zeros((B, R)), jnp.asarray(STOPPED))
  config = PPOConfig(gamma=1.0, lam=1.0)
  run = quick.jit(lambda beta, x: assemble(config, same, {'policy': 1}, 0, beta, sampled, x))
  rollouts, _, metrics = run(jnp.float32(0.5), jnp.asarray(SCORES, jnp.float32))
  values = metrics_lib.values(metrics)
  assert values['kl'] == values['kl_k3'] == 0.0
  np.testing.assert_allclose(
    rollouts.returns, np.where(MASK, SCORES[:, None], 0), rtol=1e-5, atol=1e-6
  )


def test_the_coefficient_adapts_only_with_a_target() -> None:
  """Without one it is constant; with one it follows the sequence KL of these samples by formula."""
  kl = np.where(MASK, chosen(LOGITS) - chosen(REFERENCE), 0).sum(1).mean()
  np.testing.assert_allclose(rollout()[1], BETA, rtol=1e-6)
  assert kl > 0
  target = kl / 1.1  # so that the error is 0.1
  following = rollout(kl_target=float(target), kl_horizon=100)[1]
  np.testing.assert_allclose(following, BETA * (1 + 0.1 * B / 100), rtol=1e-5)


def test_the_coefficient_scales_the_penalty_of_this_iteration() -> None:
  """Advantages and metrics use the coefficient that came in, not the next one."""
  settings: dict[str, Any] = {'gamma': 1.0, 'lam': 1.0, 'kl_horizon': 1}
  fixed, _, _ = rollout(**settings)
  adaptive, following, metrics = rollout(kl_target=0.01, **settings)
  assert following != pytest.approx(BETA)
  assert metrics['kl_coefficient'] == pytest.approx(BETA)
  np.testing.assert_array_equal(adaptive.returns, fixed.returns)


def test_integer_scores_are_refused() -> None:
  """They were truncated somewhere; scores that are floating-point in bfloat16 become float32."""
  sampled = Sampled(
    tabular.make_batch('prompts').sequences, jnp.zeros((tabular.B, tabular.R)), jnp.ones(4, bool)
  )
  tables = tabular.make_tables()
  judges = Judges(tabular.table_policy, tabular.table_policy, make_judges(0.0).logits)
  config, beta = PPOConfig(whiten_advantages=False, gamma=1.0, lam=1.0), jnp.float32(0.1)

  def returns_of(scores: Any) -> Any:
    run = quick.jit(lambda x: assemble(config, judges, tables, tables, beta, sampled, x))
    return run(scores)[0].returns

  with pytest.raises(ShapeError, match='scores: expected a floating-point array, got int32'):
    returns_of(jnp.array([1, -2, 3, 0]))
  returns = returns_of(jnp.array([1.5, -2.0, 3.0, 0.0], jnp.bfloat16))
  assert returns.dtype == jnp.float32
  np.testing.assert_allclose(returns[:, 0], [1.5, -2.0, 3.0, 0.0], atol=1e-5)
