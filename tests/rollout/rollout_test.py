"""Rollouts against a slow, row-by-row version that follows the code of Huang et al. 2024."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.common.checks import ShapeError
from rlhf_jax.common.types import PolicyOutput, Sequences
from rlhf_jax.objectives.kl_penalty import KLPenaltyConfig
from rlhf_jax.objectives.ppo import PPOConfig, collect
from rlhf_jax.ops import kl
from rlhf_jax.rollout.config import RolloutConfig
from rlhf_jax.rollout.rollout import (
  Judges,
  Sampled,
  Scored,
  assemble,
  finite_rewards,
  judge,
  repetition,
)
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

  def exact_kl(params: Any, reference: Any, sequences: Sequences) -> Any:
    assert (params, reference) == (1, 0)
    return kl.exact_kl(*(spoil(logits, MASK[..., None]) for logits in (LOGITS, REFERENCE)))

  return Judges(policy, reference, exact_kl)


def sampled_rows() -> Sampled:
  """The samples above, as generation gives them."""
  sequences = Sequences(
    prompt=jnp.ones((B, 2), jnp.int32),
    prompt_mask=jnp.array([[False, True]] * 3 + [[True, True]] * 3),
    response=jnp.asarray(TOKENS),
    response_mask=jnp.asarray(MASK),
  )
  sampler_logprobs = jnp.asarray(np.where(MASK, chosen(LOGITS) + 1e-3, 7.0), jnp.float32)
  return Sampled(sequences, sampler_logprobs, jnp.asarray(STOPPED))


def assembled(config: Any, judges: Judges, sampled: Sampled, scored: Scored, *more: Any) -> Any:
  """(experience, metrics) of samples; `more` are parameters, the reference's, and parts to read."""
  params, reference, *parts = more or ({'policy': 1}, 0)
  judged = judge(config, judges, params, reference, sampled.sequences, *parts)
  return assemble(config, sampled, judged, scored)


def experienced(masked: float = 0.0, **settings: Any) -> tuple[Any, Any]:
  """(experience, metrics) of the samples above, under `RolloutConfig` settings."""
  config, judges, sampled = RolloutConfig(**settings), make_judges(masked), sampled_rows()
  run = quick.jit(lambda scored: assembled(config, judges, sampled, scored))
  return run(Scored(jnp.asarray(SCORES, jnp.float32)))


def rollout(
  masked: float = 0.0, scoring: dict[str, Any] | None = None, **settings: Any
) -> tuple[Any, ...]:
  """(rollouts, next coefficient, metrics as numbers) of the samples above, as PPO collects them.

  `scoring` are settings of the rollout, the others those of PPO.
  """
  config = PPOConfig(**{'kl': KLPenaltyConfig(coefficient=BETA), **settings})
  experience, metrics = experienced(masked, **(scoring or {}))
  run = quick.jit(lambda experience, carry: collect(config, experience, carry))
  found = run(experience, {'kl_coefficient': jnp.float32(BETA)})
  numbers = metrics_lib.values({**metrics, **found.metrics})
  return found.batch, float(found.carry['kl_coefficient']), numbers


def whiten(values: np.ndarray, mask: np.ndarray, shift_mean: bool) -> np.ndarray:
  """`masked_whiten` of that code, with its biased variance."""
  kept = values[mask]
  whitened = (values - kept.mean()) / np.sqrt(((kept - kept.mean()) ** 2).mean() + 1e-8)
  return whitened if shift_mean else whitened + kept.mean()


def slow_rollout(config: PPOConfig, missing_stop: str) -> tuple[np.ndarray, np.ndarray]:
  """Advantages and returns, in the order of that code's steps 3 to 6, in float64.

  3. scores of responses without a stop; 4. rewards, the score paid after the stop; 5. whiten
  rewards; 6. advantages and returns over all columns, masked values being 0.
  """
  scores = np.where(STOPPED, SCORES, -1.0) if missing_stop == 'replace' else SCORES
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
  ('settings', 'missing_stop'),
  [
    ({}, 'none'),
    ({'whiten_rewards': True}, 'replace'),
    ({'gamma': 0.9, 'lam': 0.8, 'whiten_advantages': False}, 'none'),
  ],
  ids=['default', 'replace, whitened', 'discounted'],
)
def test_advantages_and_returns_equal_the_released_code(
  settings: dict[str, Any], missing_stop: str
) -> None:
  """Scores after the stop, with and without each option, over ragged rows."""
  settings = {'score_placement': 'after_stop', **settings}
  rollouts, _, _ = rollout(masked=5.0, scoring={'missing_stop': missing_stop}, **settings)
  advantages, returns = slow_rollout(PPOConfig(**settings), missing_stop)
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
    'scoring': {'exact_kl': True},
    'kl': KLPenaltyConfig(coefficient=BETA, target=1.0),
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
  rollouts, _, metrics = rollout(scoring={'missing_stop': 'replace', 'exact_kl': True})
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


def test_the_sampler_may_be_trusted() -> None:
  """Its log-probs are the old ones, and the policy's own are not asked for."""
  experience, metrics = experienced(old_logprobs='sampler')
  expected, _ = experienced()
  sampler = np.where(MASK, chosen(LOGITS) + 1e-3, 0.0)
  np.testing.assert_allclose(experience.old_logprobs, sampler, atol=1e-6)
  for name in ('reference_logprobs', 'values', 'scores'):
    np.testing.assert_array_equal(getattr(experience, name), getattr(expected, name))
  kl = (sampler - np.where(MASK, chosen(REFERENCE), 0.0)).sum(1).mean()
  values = metrics_lib.values(metrics)
  assert values['kl'] == pytest.approx(kl, rel=1e-5)
  assert not {'sampler_logprob_error', 'entropy'} & values.keys()


def test_an_untouched_policy_has_no_divergence() -> None:
  """Policy = reference: every KL is 0 and rewards are the scores alone."""
  judges = make_judges(0.0)
  same = judges._replace(reference=lambda params, rows: judges.policy({'policy': 1}, rows))
  config = PPOConfig(gamma=1.0, lam=1.0)

  @quick.jit
  def run(beta: Any, scores: Any) -> Any:
    experience, metrics = assembled(RolloutConfig(), same, sampled_rows(), Scored(scores))
    return collect(config, experience, {'kl_coefficient': beta}).batch, metrics

  rollouts, metrics = run(jnp.float32(0.5), jnp.asarray(SCORES, jnp.float32))
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
  penalty = KLPenaltyConfig(coefficient=BETA, target=float(target), horizon=100)
  following = rollout(kl=penalty)[1]
  np.testing.assert_allclose(following, BETA * (1 + 0.1 * B / 100), rtol=1e-5)


def test_the_coefficient_scales_the_penalty_of_this_iteration() -> None:
  """Advantages and metrics use the coefficient that came in, not the next one."""
  settings: dict[str, Any] = {'gamma': 1.0, 'lam': 1.0}
  fixed, _, _ = rollout(**settings)
  penalty = KLPenaltyConfig(coefficient=BETA, target=0.01, horizon=1)
  adaptive, following, metrics = rollout(kl=penalty, **settings)
  assert following != pytest.approx(BETA)
  assert metrics['kl_coefficient'] == pytest.approx(BETA)
  np.testing.assert_array_equal(adaptive.returns, fixed.returns)


def test_integer_scores_are_refused() -> None:
  """They were truncated somewhere; scores that are floating-point in bfloat16 become float32."""
  sampled = Sampled(
    tabular.make_batch('rollouts').sequences, jnp.zeros((tabular.B, tabular.R)), jnp.ones(4, bool)
  )
  config, tables = RolloutConfig(), tabular.make_tables()
  judges = Judges(tabular.table_policy, tabular.table_policy, make_judges(0.0).exact_kl)

  def scores_of(scores: Any) -> Any:
    run = quick.jit(lambda x: assembled(config, judges, sampled, Scored(x), tables, tables))
    return run(scores)[0].scores

  with pytest.raises(ShapeError, match='scores: expected a floating-point array, got int32'):
    scores_of(jnp.array([1, -2, 3, 0]))
  scores = scores_of(jnp.array([1.5, -2.0, 3.0, 0.0], jnp.bfloat16))
  assert scores.dtype == jnp.float32
  np.testing.assert_array_equal(scores, [1.5, -2.0, 3.0, 0.0])


def test_an_experience_is_what_was_sampled_and_what_judges_say_of_it() -> None:
  """Log-probs are 0 behind the end; token rewards pass through; nothing depends on the parts."""
  whole, metrics = experienced(masked=np.nan, missing_stop='subtract', missing_stop_value=0.75)
  for name, logits in (('old_logprobs', LOGITS), ('reference_logprobs', REFERENCE)):
    found = getattr(whole, name)
    np.testing.assert_allclose(found, np.where(MASK, chosen(logits), 0), rtol=1e-5)
    assert found.dtype == jnp.float32
  np.testing.assert_allclose(whole.scores, np.where(STOPPED, SCORES, SCORES - 0.75), rtol=1e-6)
  assert whole.token_rewards is None
  np.testing.assert_array_equal(whole.sequences.response, TOKENS)
  paid = jnp.asarray(RNG.normal(size=(B, R)), jnp.float32)
  scored = Scored(jnp.asarray(SCORES, jnp.float32), paid)
  experience, _ = assembled(RolloutConfig(), make_judges(0.0), sampled_rows(), scored)
  np.testing.assert_array_equal(experience.token_rewards, paid)


@pytest.mark.parametrize('parts', [2, 4])
def test_models_may_read_the_samples_in_parts(parts: int) -> None:
  """Experience and metrics, the exact KL among them, are those of one piece."""
  batch = tabular.make_batch('rollouts')
  sampled = Sampled(batch.sequences, batch.old_logprobs, jnp.ones(tabular.B, bool))
  tables, others = tabular.make_tables(1), tabular.make_tables(2)

  def logits(params: Any, rows: Sequences) -> Any:
    before = jnp.concatenate([rows.prompt[..., -1:], rows.response[..., :-1]], axis=-1)
    return params[jnp.arange(before.shape[-1]), before]

  def exact_kl(params: Any, reference: Any, rows: Sequences) -> Any:
    return kl.exact_kl(logits(params, rows), logits(reference, rows))

  judges = Judges(tabular.table_policy, tabular.table_policy, exact_kl)
  reference = others['policy']
  judges = judges._replace(
    reference=lambda params, rows: tabular.table_policy({**others, 'policy': params}, rows)
  )

  def run(parts: int) -> Any:
    config, scored = RolloutConfig(exact_kl=True), Scored(jnp.arange(float(tabular.B)))
    more = (scored, tables, reference, parts)
    experience, metrics = quick.jit(lambda rows: assembled(config, judges, rows, *more))(sampled)
    return experience, metrics_lib.values(metrics)

  (split, numbers), (whole, expected) = run(parts), run(1)
  for name in ('old_logprobs', 'reference_logprobs', 'values', 'scores'):
    np.testing.assert_allclose(getattr(split, name), getattr(whole, name), rtol=1e-6, atol=1e-7)
  assert numbers == pytest.approx(expected, rel=1e-5)
  assert expected['exact_kl'] > 0.1


@pytest.mark.parametrize('size', [1, 2, 4])
def test_repetition_is_the_share_of_n_grams_that_were_said_before(size: int) -> None:
  """By sets of tuples, for random responses of all lengths; padding repeats nothing."""
  rng = np.random.default_rng(0)
  response = rng.integers(0, 2, (32, 12))
  lengths = rng.integers(0, 13, 32)
  mask = np.arange(12) < lengths[:, None]
  prompt = jnp.ones((32, 1), jnp.int32)
  sequences = Sequences(prompt, prompt > 0, jnp.asarray(response), jnp.asarray(mask))
  shares, long_enough = quick.jit(lambda rows: repetition(rows, size))(sequences)
  for row, length in enumerate(lengths):
    grams = [tuple(response[row, i : i + size]) for i in range(length - size + 1)]
    assert bool(long_enough[row]) == bool(grams)
    if grams:
      assert float(shares[row]) == pytest.approx(1 - len(set(grams)) / len(grams))
  short = Sequences(prompt, prompt > 0, jnp.ones((32, 3), jnp.int32), jnp.ones((32, 3), bool))
  assert not np.asarray(repetition(short)[1]).any()


def test_a_reward_that_is_not_finite_is_found_where_a_gate_hides_it() -> None:
  scores, bad = jnp.zeros(4), jnp.array([0.0, jnp.nan, 0.0, 0.0])
  terms = jnp.stack([scores, bad], axis=1)
  tokens = jnp.zeros((4, 3)).at[2, 1].set(-jnp.inf)
  found = finite_rewards(Scored(scores.at[3].set(jnp.inf), tokens, terms=terms))
  np.testing.assert_array_equal(found, [True, False, False, False])


def test_a_sampler_that_gives_no_logprobs() -> None:
  """Its error is then no metric, rather than a number that means nothing."""
  config, judges = RolloutConfig(), make_judges(0.0)
  sampled = sampled_rows()._replace(sampler_logprobs=None)
  scored = Scored(jnp.asarray(SCORES, jnp.float32))
  _, metrics = assembled(config, judges, sampled, scored)
  _, expected = assembled(config, judges, sampled_rows(), scored)
  assert expected.keys() - metrics.keys() == {'sampler_logprob_error'}
