"""Implicit Q-learning's losses against the equations of its paper, in float64 NumPy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.checks import ShapeError
from rlhf_jax.objectives import iql
from rlhf_jax.objectives.iql import IQLConfig
from tests import numerical, quick
from tests.golden import golden
from tests.objectives import tabular
from tests.objectives.settings import assert_refused

RNG = np.random.default_rng(0)
SHAPE = (3, 4)
VALUES, TARGET_Q, LOGPROBS, REWARDS, NEXT = (RNG.normal(0, 2, SHAPE) for _ in range(5))
Q = RNG.normal(0, 2, (2, *SHAPE))
NOT_DONE: Any = RNG.random(SHAPE) < 0.7
WEIGHTS = RNG.normal(size=SHAPE)

every_expectile = pytest.mark.parametrize('expectile', [0.5, 0.7, 0.9])


def slow_expectile(difference: np.ndarray, expectile: float) -> np.ndarray:
  """|tau - 1(u < 0)| u^2, entry by entry."""
  out = np.zeros_like(difference)
  for index, u in np.ndenumerate(difference):
    out[index] = abs(expectile - (1.0 if u < 0 else 0.0)) * u**2
  return out


def slow_policy(logprobs: np.ndarray, temperature: float) -> np.ndarray:
  """-min(exp(beta (Q - V)), 100) log pi, entry by entry."""
  out = np.zeros_like(logprobs)
  for index, logprob in np.ndenumerate(logprobs):
    weight = float(np.exp(temperature * (TARGET_Q[index] - VALUES[index])))
    out[index] = -min(weight, 100.0) * logprob
  return out


@pytest.mark.parametrize('case', ['defaults', 'cut_weights'])
def test_the_losses_are_those_of_the_released_code(case: str) -> None:
  """Values and gradients of its training step (tests/golden/make_piql.py); its Q loss is a mean."""
  found = golden.load('piql')
  inputs, expected = found['inputs'], found['cases'][case]
  settings = expected['hyperparameters']
  weighing = {name: settings[name] for name in ('temperature', 'max_weight')}
  target_q = inputs['target_q'].min(0)

  def losses(trained: dict[str, Any]) -> tuple[Any, Any]:
    terms = {
      'v': iql.value_loss(trained['values'], target_q, expectile=settings['expectile']).mean(),
      'q': iql.q_loss(
        trained['q'],
        inputs['rewards'],
        inputs['next_values'],
        inputs['not_done'],
        gamma=settings['gamma'],
      ).mean()
      / len(trained['q']),
      'actor': iql.policy_loss(trained['logprobs'], target_q, inputs['values'], **weighing).mean(),
    }
    return sum(terms.values()), terms

  trained = {name: inputs[name] for name in ('values', 'q', 'logprobs')}
  (_, terms), slopes = jax.jit(jax.value_and_grad(losses, has_aux=True))(trained)
  for name, term in terms.items():
    np.testing.assert_allclose(term, expected['outputs'][name], rtol=1e-5, err_msg=name)
  for name, slope in slopes.items():
    np.testing.assert_allclose(
      slope, expected['gradients'][name], rtol=1e-5, atol=1e-6, err_msg=name
    )


def f32(*arrays: Any) -> tuple[jax.Array, ...]:
  """As the losses get them."""
  return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


@every_expectile
def test_the_expectile_loss_and_its_gradient(expectile: float) -> None:
  """Values by the definition, slopes by central differences."""
  (difference,) = f32(VALUES)
  loss = functools.partial(iql.expectile_loss, expectile=expectile)
  assert loss(difference).dtype == jnp.float32
  np.testing.assert_allclose(loss(difference), slow_expectile(VALUES, expectile), rtol=1e-5)
  slopes = quick.jit(jax.grad(lambda u: (loss(u) * WEIGHTS).sum()))(difference)
  expected = numerical.gradient(lambda u: (slow_expectile(u, expectile) * WEIGHTS).sum(), VALUES)
  np.testing.assert_allclose(slopes, expected, rtol=1e-4, atol=1e-6)


@every_expectile
def test_its_minimiser_is_the_expectile(expectile: float) -> None:
  """At m the mean excess above, times tau, is that below times 1 - tau; 0.5 gives the mean."""
  sample = RNG.normal(1, 2, 500)
  points = np.linspace(-3, 6, 9001)
  (u,) = f32(sample[None] - points[:, None])
  best = points[np.asarray(iql.expectile_loss(u, expectile)).mean(1).argmin()]
  above, below = np.maximum(sample - best, 0).mean(), np.maximum(best - sample, 0).mean()
  assert expectile * above == pytest.approx((1 - expectile) * below, abs=2e-3)
  if expectile == 0.5:
    assert best == pytest.approx(sample.mean(), abs=2e-3)


def test_higher_expectiles_lie_towards_the_maximum() -> None:
  """The slope at the largest of a sample vanishes as tau goes to 1."""
  sample = jnp.asarray(RNG.normal(size=50), jnp.float32)
  slope = jax.grad(lambda m, tau: iql.expectile_loss(sample - m, tau).mean())
  slopes = [float(slope(sample.max(), tau)) for tau in (0.5, 0.9, 0.99, 0.999)]
  assert slopes == sorted(slopes, reverse=True) and 0 < slopes[-1] < 0.01


@every_expectile
def test_the_value_loss_and_its_gradient(expectile: float) -> None:
  """Equation 5; Q is a constant."""
  loss = functools.partial(iql.value_loss, expectile=expectile)
  values, target_q = f32(VALUES, TARGET_Q)
  np.testing.assert_allclose(
    loss(values, target_q), slow_expectile(TARGET_Q - VALUES, expectile), rtol=1e-4, atol=1e-6
  )
  by_values, by_q = quick.jit(jax.grad(lambda v, q: (loss(v, q) * WEIGHTS).sum(), argnums=(0, 1)))(
    values, target_q
  )
  expected = numerical.gradient(
    lambda v: (slow_expectile(TARGET_Q - v, expectile) * WEIGHTS).sum(), VALUES
  )
  np.testing.assert_allclose(by_values, expected, rtol=1e-4, atol=1e-5)
  assert not np.any(by_q)


def slow_q(q: np.ndarray, gamma: float) -> np.ndarray:
  """Both squared errors against r, and gamma V(s') unless all is over; entry by entry."""
  out = np.zeros(SHAPE)
  for index in np.ndindex(SHAPE):
    target = REWARDS[index] + (gamma * NEXT[index] if NOT_DONE[index] else 0.0)
    out[index] = sum((target - one[index]) ** 2 for one in q)
  return out


@pytest.mark.parametrize('gamma', [1.0, 0.9, 0.0])
def test_the_q_loss_and_its_gradient(gamma: float) -> None:
  """Equation 6, both Q; rewards and V(s') are constants."""
  loss = functools.partial(iql.q_loss, not_done=NOT_DONE, gamma=gamma)
  q, rewards, following = f32(Q, REWARDS, NEXT)
  actual = loss(q, rewards, following)
  assert actual.shape == SHAPE and actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, slow_q(Q, gamma), rtol=1e-4, atol=1e-5)
  by_q, *others = quick.jit(jax.grad(lambda *x: (loss(*x) * WEIGHTS).sum(), argnums=(0, 1, 2)))(
    q, rewards, following
  )
  expected = numerical.gradient(lambda x: (slow_q(x, gamma) * WEIGHTS).sum(), Q)
  np.testing.assert_allclose(by_q, expected, rtol=1e-4, atol=1e-4)
  assert not any(np.any(slope) for slope in others)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_the_value_after_the_end_is_never_read(bad: float) -> None:
  """Whatever it says, loss and gradient are as if it were 0."""
  q, rewards, dirty, clean = f32(
    Q, REWARDS, np.where(NOT_DONE, NEXT, bad), np.where(NOT_DONE, NEXT, 0)
  )
  both = jax.value_and_grad(lambda q, v: iql.q_loss(q, rewards, v, NOT_DONE, gamma=0.9).sum())
  for one, other in zip(both(q, dirty), both(q, clean), strict=True):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('temperature', [0.0, 0.5, 3.0])
def test_the_policy_loss_and_its_gradient(temperature: float) -> None:
  """Equation 7 with weights cut at 100; Q and V are constants."""
  loss = functools.partial(iql.policy_loss, temperature=temperature)
  logprobs, target_q, values = f32(LOGPROBS, TARGET_Q, VALUES)
  np.testing.assert_allclose(
    loss(logprobs, target_q, values), slow_policy(LOGPROBS, temperature), rtol=1e-4, atol=1e-6
  )
  by_logprobs, *others = quick.jit(
    jax.grad(lambda *x: (loss(*x) * WEIGHTS).sum(), argnums=(0, 1, 2))
  )(logprobs, target_q, values)
  expected = numerical.gradient(lambda x: (slow_policy(x, temperature) * WEIGHTS).sum(), LOGPROBS)
  np.testing.assert_allclose(by_logprobs, expected, rtol=1e-4, atol=1e-5)
  assert not any(np.any(slope) for slope in others)


def test_temperature_zero_is_behaviour_cloning() -> None:
  """Every weight is 1."""
  logprobs, target_q, values = f32(LOGPROBS, TARGET_Q, VALUES)
  np.testing.assert_allclose(
    iql.policy_loss(logprobs, target_q, values, temperature=0.0), -LOGPROBS, rtol=1e-6
  )


def test_weights_are_cut_and_never_overflow() -> None:
  """At max_weight above, at 0 below, and exact in between."""
  advantage = jnp.array([-1e30, -1.0, 0.0, 1.0, 2.0, 1e30])
  weights = iql.advantage_weights(advantage, jnp.zeros(6), temperature=3.0)
  np.testing.assert_allclose(
    weights, [0.0, np.exp(-3), 1.0, np.exp(3), 100.0, 100.0], rtol=1e-5, atol=1e-12
  )
  lower = iql.advantage_weights(advantage, jnp.zeros(6), temperature=3.0, max_weight=5.0)
  np.testing.assert_allclose(lower, np.minimum(weights, 5.0), rtol=1e-5)


def test_bfloat16_inputs_give_float32_losses() -> None:
  """The arithmetic is float32, so the inputs' rounding is the only error."""
  values, target_q, logprobs, rewards, following = (
    jnp.asarray(x, jnp.bfloat16) for x in (VALUES, TARGET_Q, LOGPROBS, REWARDS, NEXT)
  )
  wide = [x.astype(jnp.float32) for x in (values, target_q, logprobs, rewards, following)]
  q = jnp.asarray(Q, jnp.bfloat16)
  for narrow, exact in (
    (iql.value_loss(values, target_q, expectile=0.7), iql.value_loss(*wide[:2], expectile=0.7)),
    (
      iql.q_loss(q, rewards, following, NOT_DONE, gamma=0.9),
      iql.q_loss(q.astype(jnp.float32), wide[3], wide[4], NOT_DONE, gamma=0.9),
    ),
    (
      iql.policy_loss(logprobs, target_q, values, temperature=3.0),
      iql.policy_loss(wide[2], wide[1], wide[0], temperature=3.0),
    ),
  ):
    assert narrow.dtype == jnp.float32
    np.testing.assert_array_equal(narrow, exact)


def test_integer_rewards_are_refused() -> None:
  """They would truncate whatever is computed of them."""
  with pytest.raises(ShapeError, match='rewards: expected a floating-point array'):
    iql.q_loss(
      jnp.zeros((2, 3)), jnp.zeros(3, jnp.int32), jnp.zeros(3), jnp.ones(3, bool), gamma=1.0
    )


@pytest.mark.parametrize(
  'config', [IQLConfig(), IQLConfig(gamma=0.8, expectile=0.9, temperature=1.0, max_weight=2.0)]
)
def test_the_loss_is_the_sum_of_the_three(config: IQLConfig) -> None:
  """Mean over steps with a successor; values, and gradients with all else held constant."""
  batch, outputs = tabular.make_batch('step_ratings'), tabular.make_outputs('step_ratings')
  fixed = {name: values.astype(np.float64) for name, values in outputs.items()}

  def slow(x: dict[str, np.ndarray]) -> float:
    losses = []
    for index in zip(*np.nonzero(batch.score_mask), strict=True):
      advantage = fixed['target_q'][index] - x['values'][index]
      tau = config.expectile if advantage > 0 else 1 - config.expectile
      goal = batch.score[index] + config.gamma * fixed['next_values'][index]
      errors = [(goal - q[index]) ** 2 for q in x['q']]
      held = fixed['target_q'][index] - fixed['values'][index]
      weight = min(np.exp(config.temperature * held), config.max_weight)
      losses.append(tau * advantage**2 + sum(errors) - weight * x['logprobs'][index])
    return float(np.mean(losses))

  names = ('logprobs', 'values', 'q')
  tabular.assert_equals_slow_loss(config, batch, outputs, slow, *names)


@pytest.mark.parametrize(
  ('settings', 'field'),
  [
    ({'gamma': 0.0}, 'gamma'),
    ({'expectile': 1.0}, 'expectile'),
    ({'target_rate': 1.0}, 'target_rate'),
    ({'temperature': -1.0}, 'temperature'),
    ({'max_weight': 0.5}, 'max_weight'),
  ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], field: str) -> None:
  """The error has the field's dotted name."""
  assert_refused(IQLConfig, settings, field)
