"""Generalised advantage estimation and discounted sums against slow loops over single rows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.checks import ShapeError
from rlhf_jax.ops import advantages as advantages_lib
from tests import numerical, quick

gae = jax.jit(advantages_lib.gae, static_argnames=('gamma', 'lam'))
discounted_sum = jax.jit(advantages_lib.discounted_sum, static_argnums=2)

RNG = np.random.default_rng(0)
LENGTHS = np.array([5, 3, 1, 0])
B, R = len(LENGTHS), 5
MASK: Any = np.arange(R) < LENGTHS[:, None]
REWARDS: Any = RNG.normal(0, 1, (B, R))
VALUES: Any = RNG.normal(0, 1, (B, R))


def slow_advantages(
  rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float
) -> np.ndarray:
  """Sum over l of (gamma lam)^l delta_{t+l} (Schulman et al. 2016, eq. 16), row by row.

  Only the unmasked steps of a row are looked at; the state after the last has value 0.
  """
  out = np.zeros((B, R))
  for b, length in enumerate(LENGTHS):
    r, v = rewards[b, :length], np.append(values[b, :length], 0.0)
    deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
    for t in range(length):
      out[b, t] = sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, length))
  return out


DISCOUNTS = [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0), (0.0, 0.5)]


@pytest.mark.parametrize(('gamma', 'lam'), DISCOUNTS)
def test_equals_the_sum_of_discounted_residuals(gamma: float, lam: float) -> None:
  """Advantages and returns of ragged rows equal the slow loop; masked steps are 0."""
  advantages, returns = gae(
    jnp.asarray(REWARDS, jnp.float32), jnp.asarray(VALUES, jnp.float32), MASK, gamma=gamma, lam=lam
  )
  expected = slow_advantages(REWARDS, VALUES, gamma, lam)
  np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(returns, np.where(MASK, expected + VALUES, 0), rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(np.asarray(advantages)[~MASK], 0.0)
  np.testing.assert_array_equal(np.asarray(returns)[~MASK], 0.0)


def test_gradients_equal_central_differences() -> None:
  """By rewards and by values, with random cotangents; exactly 0 under the mask."""
  weights = RNG.normal(0, 1, (B, R))
  settings = {'gamma': 0.9, 'lam': 0.8}

  def fast(rewards: jax.Array, values: jax.Array) -> jax.Array:
    return (gae(rewards, values, MASK, **settings)[0] * weights).sum()

  slopes = quick.jit(jax.grad(fast, argnums=(0, 1)))(
    jnp.asarray(REWARDS, jnp.float32), jnp.asarray(VALUES, jnp.float32)
  )
  by_rewards = numerical.gradient(
    lambda r: (slow_advantages(r, VALUES, **settings) * weights).sum(), REWARDS
  )
  by_values = numerical.gradient(
    lambda v: (slow_advantages(REWARDS, v, **settings) * weights).sum(), VALUES
  )
  for actual, expected in zip(slopes, (by_rewards, by_values), strict=True):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(actual)[~MASK], 0.0)


def test_a_worked_example() -> None:
  """Two steps, gamma 0.5, lam 0.5: deltas -1 and 1 by hand, so advantages -0.75 and 1."""
  rewards, values = jnp.array([[0.0, 3.0]]), jnp.array([[2.0, 2.0]])
  advantages, returns = gae(rewards, values, jnp.ones((1, 2), bool), gamma=0.5, lam=0.5)
  np.testing.assert_allclose(advantages, [[-0.75, 1.0]])
  np.testing.assert_allclose(returns, [[1.25, 3.0]])


def test_undiscounted_returns_are_rewards_to_go() -> None:
  """With gamma = lam = 1 returns do not depend on the values; with lam 0 they are one-step."""
  rewards = jnp.asarray(REWARDS, jnp.float32)
  to_go = np.where(MASK, np.where(MASK, REWARDS, 0)[:, ::-1].cumsum(1)[:, ::-1], 0)
  for scale in (0.0, 1.0, -3.0):
    returns = gae(rewards, jnp.asarray(scale * VALUES, jnp.float32), MASK, gamma=1.0, lam=1.0)[1]
    np.testing.assert_allclose(returns, to_go, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('bad', [np.nan, np.inf, 1e30])
def test_masked_garbage_is_never_read(bad: float) -> None:
  """Rewards and values behind the end of a row, whatever they hold, change nothing."""
  rewards: Any = np.where(MASK, REWARDS, bad).astype(np.float32)
  values: Any = np.where(MASK, VALUES, bad).astype(np.float32)
  clean = gae(
    jnp.asarray(REWARDS, jnp.float32), jnp.asarray(VALUES, jnp.float32), MASK, gamma=1.0, lam=0.9
  )
  for actual, expected in zip(gae(rewards, values, MASK, gamma=1.0, lam=0.9), clean, strict=True):
    np.testing.assert_array_equal(actual, expected)


def test_more_padding_changes_nothing() -> None:
  """Three more masked columns leave the old ones as they were."""
  rewards, values = (
    jnp.asarray(np.pad(x, ((0, 0), (0, 3)), constant_values=9.0), jnp.float32)
    for x in (REWARDS, VALUES)
  )
  mask: Any = np.pad(MASK, ((0, 0), (0, 3)))
  narrow = gae(
    jnp.asarray(REWARDS, jnp.float32), jnp.asarray(VALUES, jnp.float32), MASK, gamma=0.9, lam=0.9
  )
  padded = gae(rewards, values, mask, gamma=0.9, lam=0.9)
  for few, many in zip(narrow, padded, strict=True):
    np.testing.assert_array_equal(few, np.asarray(many)[:, :R])
    np.testing.assert_array_equal(np.asarray(many)[:, R:], 0.0)


def test_integer_rewards_are_refused() -> None:
  """zeros_like(tokens) as rewards would truncate every score to an integer."""
  values, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
  with pytest.raises(ShapeError, match='rewards: expected a floating-point array, got int32'):
    gae(jnp.zeros((1, 2), jnp.int32), values, mask, gamma=1.0, lam=1.0)
  with pytest.raises(ShapeError, match='values: axis R'):
    gae(jnp.zeros((1, 2)), jnp.zeros((1, 3)), mask, gamma=1.0, lam=1.0)


@pytest.mark.parametrize('gamma', [1.0, 0.9, 0.5])
def test_discounted_sum_equals_a_loop(gamma: float) -> None:
  """sum_t gamma^t x_t over unmasked steps, any leading axes, garbage under the mask unread."""
  dirty: Any = np.where(MASK, REWARDS, np.nan).astype(np.float32).reshape(2, 2, R)
  expected = [sum(gamma**t * REWARDS[b, t] for t in range(LENGTHS[b])) for b in range(B)]
  actual = discounted_sum(dirty, MASK.reshape(2, 2, R), gamma)
  np.testing.assert_allclose(actual, np.reshape(expected, (2, 2)), rtol=1e-5, atol=1e-6)
  slopes = quick.jit(jax.grad(lambda x: discounted_sum(x, MASK.reshape(2, 2, R), gamma).sum()))(
    dirty
  )
  discounts = np.broadcast_to(gamma ** np.arange(R), (B, R))
  np.testing.assert_allclose(np.reshape(slopes, (B, R)), np.where(MASK, discounts, 0), rtol=1e-6)
