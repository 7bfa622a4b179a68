"""The closed forms of the LQR task against integrals, rollouts and iteration."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.data.lqr import LQR, LQRConfig
from tests import numerical

CONFIGS = [
  LQRConfig(),
  LQRConfig(
    gamma=0.8,
    time_step=0.5,
    position_cost=0.3,
    velocity_cost=0.0,
    optimal_std=0.2,
    velocity_std=2.0,
  ),
]
every_config = pytest.mark.parametrize('config', CONFIGS, ids=['default', 'other'])

RNG = np.random.default_rng(0)
STATES = RNG.normal(0, 1.5, (7, 2))
ACTIONS = RNG.normal(0, 1.5, (7, 1))


def grid(task: LQR, config: LQRConfig, states: np.ndarray) -> tuple[np.ndarray, float]:
  """`[N, 4001, 1]` actions out to 10 standard deviations of the optimal policy, and their step."""
  offsets = np.linspace(-10, 10, 4001) * config.optimal_std
  return (states @ task.gain.T)[:, None] + offsets[:, None], offsets[1] - offsets[0]


def moments(task: LQR, gain: np.ndarray, std: float, first: np.ndarray) -> Any:
  """E[s_t s_t'] under a = gain s + noise, for 1000 steps, from that of the first state."""
  for _ in range(1000):
    yield first
    closed = task.A + task.B @ gain
    first = closed @ first @ closed.T + std**2 * task.B @ task.B.T


def slow_cost(task: LQR, gain: np.ndarray, std: float, first: np.ndarray) -> float:
  """The discounted cost, summed step by step."""
  total = 0.0
  for t, moment in enumerate(moments(task, gain, std, first)):
    step = np.trace(task.Q @ moment) + task.R[0, 0] * ((gain @ moment @ gain.T)[0, 0] + std**2)
    total += task.gamma**t * step
  return total


@every_config
def test_the_value_is_the_soft_maximum_of_q(config: LQRConfig) -> None:
  """V = log int exp Q da, Q = r + gamma V(s'), by quadrature; A = Q - V and int exp A da = 1."""
  task = LQR(config)
  actions, step = grid(task, config, STATES)
  q = task.q_value(np.broadcast_to(STATES[:, None], (7, 4001, 2)), actions)
  peak = q.max(1)
  soft = peak + np.log(np.exp(q - peak[:, None]).sum(1) * step)
  np.testing.assert_allclose(task.value(STATES), soft, rtol=1e-10)
  advantages = task.advantage(np.broadcast_to(STATES[:, None], (7, 4001, 2)), actions)
  np.testing.assert_allclose(advantages, q - soft[:, None], atol=1e-8)
  np.testing.assert_allclose(np.exp(advantages).sum(1) * step, 1.0, rtol=1e-10)
  np.testing.assert_array_equal(advantages.argmax(1), 2000)  # the mean of the optimal policy
  by_step = task.reward(STATES, ACTIONS) + task.gamma * task.value(task.step(STATES, ACTIONS))
  np.testing.assert_allclose(task.q_value(STATES, ACTIONS), by_step)


@every_config
def test_the_advantage_is_the_log_density_of_the_optimal_policy(config: LQRConfig) -> None:
  """A Gaussian about the optimal gain, of the standard deviation that the config says."""
  task = LQR(config)
  density = stats.norm.logpdf(ACTIONS[:, 0], (STATES @ task.gain.T)[:, 0], config.optimal_std)
  np.testing.assert_allclose(task.advantage(STATES, ACTIONS), density, rtol=1e-9)


def test_the_default_advantage_is_that_of_the_released_code() -> None:
  """-(mean - a)^2 and a constant."""
  task = LQR(LQRConfig())
  square = (ACTIONS[:, 0] - (STATES @ task.gain.T)[:, 0]) ** 2
  np.testing.assert_allclose(task.advantage(STATES, ACTIONS) + square, -math.log(math.pi) / 2)


@every_config
def test_the_value_is_what_the_optimal_policy_earns(config: LQRConfig) -> None:
  """Discounted rewards and entropies of 1000 steps, in expectation; Q after any first action."""
  task = LQR(config)
  entropy = stats.norm.entropy(scale=config.optimal_std)
  discounts = (1 - task.gamma**1000) / (1 - task.gamma)
  for state in STATES[:3]:
    spent = slow_cost(task, task.gain, config.optimal_std, np.outer(state, state))
    np.testing.assert_allclose(task.value(state), discounts * entropy - spent, rtol=1e-9)


def test_the_value_is_what_sampled_rollouts_earn() -> None:
  """The same by 20,000 random rollouts, within 4 standard errors."""
  config = LQRConfig(gamma=0.8)
  task, rng = LQR(config), np.random.default_rng(1)
  first = np.array([1.0, -0.5])
  states = np.broadcast_to(first, (20_000, 2))
  total = np.zeros(20_000)
  for t in range(100):
    actions = states @ task.gain.T + config.optimal_std * rng.standard_normal((20_000, 1))
    total += 0.8**t * (task.reward(states, actions) - task.advantage(states, actions))
    states = task.step(states, actions)
  assert abs(total.mean() - task.value(first)) < 4 * total.std() / math.sqrt(20_000)


@every_config
def test_the_solution_is_the_limit_of_value_iteration(config: LQRConfig) -> None:
  """Bellman backups of the cost to go from 0, with the best action found anew each time."""
  task = LQR(config)
  P = np.zeros((2, 2))
  for _ in range(2000):
    M = task.R + task.gamma * task.B.T @ P @ task.B
    gain = -task.gamma * np.linalg.solve(M, task.B.T @ P @ task.A)
    closed = task.A + task.B @ gain
    P = task.Q + gain.T @ task.R @ gain + task.gamma * closed.T @ P @ closed
  np.testing.assert_allclose(task.P, P, rtol=1e-9)
  np.testing.assert_allclose(task.gain, gain, rtol=1e-9)


@every_config
@pytest.mark.parametrize('std', [0.0, 0.7])
def test_costs_equal_the_sum_over_steps(config: LQRConfig, std: float) -> None:
  """Any gain that does not diverge, with and without noise."""
  task = LQR(config)
  for gain in (task.gain, 0.5 * task.gain, np.array([[-0.3, -0.8]])):
    expected = slow_cost(task, gain, std, task.initial)
    np.testing.assert_allclose(task.cost(gain, std), expected, rtol=1e-9)


@every_config
def test_no_gain_costs_less_than_the_optimal_one(config: LQRConfig) -> None:
  """Its cost is the optimal cost and has no slope, and every change of it costs more."""
  task = LQR(config)
  assert task.cost(task.gain) == pytest.approx(task.optimal_cost, rel=1e-10)
  slope = numerical.gradient(lambda gain: task.cost(gain), task.gain)
  np.testing.assert_allclose(slope, 0, atol=1e-6 * task.optimal_cost)
  for change in RNG.normal(0, 0.1, (20, 1, 2)):
    assert task.cost(task.gain + change) > task.optimal_cost


@every_config
def test_no_other_noise_is_worth_its_entropy(config: LQRConfig) -> None:
  """Cost less entropies is least at the optimal standard deviation, where it is -E V(first)."""
  task = LQR(config)

  def balance(std: np.ndarray) -> float:
    entropy = float(stats.norm.entropy(scale=std[0]))
    return task.cost(task.gain, float(std[0])) - entropy / (1 - task.gamma)

  best = np.array([config.optimal_std])
  assert balance(best) == pytest.approx(
    task.optimal_cost - task.log_normalizer / (1 - task.gamma), rel=1e-9
  )
  np.testing.assert_allclose(numerical.gradient(balance, best), 0, atol=1e-5)
  assert balance(0.9 * best) > balance(best) < balance(1.1 * best)


def test_a_gain_that_diverges_costs_infinitely_much() -> None:
  """Pushing away from the origin; but what grows slower than the discount has a finite cost."""
  task = LQR(LQRConfig())
  assert task.cost(-task.gain) == math.inf
  assert math.isfinite(task.cost(np.zeros((1, 2))))


def test_the_unit_of_cost_changes_noise_alone() -> None:
  """Half the optimal standard deviation is 4 times the cost in nats, and the same gain."""
  one, other = (LQR(LQRConfig(optimal_std=std)) for std in (0.6, 0.3))
  np.testing.assert_allclose(one.gain, other.gain, rtol=1e-9)
  np.testing.assert_allclose(4 * one.P, other.P, rtol=1e-9)


def test_gain_errors_are_relative() -> None:
  """0 at the optimum, 1 for no control at all; other shapes are refused."""
  task = LQR(LQRConfig())
  assert task.gain_error(task.gain) == 0
  assert task.gain_error(0 * task.gain) == pytest.approx(1.0)
  assert task.gain_error(1.05 * task.gain) == pytest.approx(0.05)
  with pytest.raises(ValueError, match=r'gain: expected shape \(1, 2\), got \(2, 1\)'):
    task.gain_error(task.gain.T)
  with pytest.raises(ValueError, match=r'gain: expected shape'):
    task.cost(task.gain.T)


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('pairs', 0),
    ('horizon', 0),
    ('labels', 'reward'),
    ('temperature', -1.0),
    ('temperature', math.nan),
    ('behaviour_gain', math.inf),
    ('behaviour_spread', -0.1),
    ('behaviour_std', -0.1),
    ('position_std', 0.0),
    ('velocity_std', 0.0),
    ('time_step', 0.0),
    ('gamma', 1.0),
    ('gamma', 0.0),
    ('position_cost', 0.0),
    ('velocity_cost', -1.0),
    ('optimal_std', 0.0),
    ('seed', -1),
  ],
)
def test_values_that_cannot_work_are_refused(field: str, value: Any) -> None:
  """The message names the field."""
  LQRConfig().validate('data.lqr')
  with pytest.raises(ConfigError, match=rf'--config\.data\.lqr\.{field}='):
    dataclasses.replace(LQRConfig(), **{field: value}).validate('data.lqr')


def test_behaviour_without_any_variety_is_refused() -> None:
  """One of the two kinds of it is enough."""
  LQRConfig(behaviour_spread=0.0).validate('data.lqr')
  LQRConfig(behaviour_std=0.0).validate('data.lqr')
  with pytest.raises(ConfigError, match='mirror image'):
    LQRConfig(behaviour_spread=0.0, behaviour_std=0.0).validate('data.lqr')
