"""Implicit Q-learning (Kostrikov et al. 2021): its three losses, element by element.

    L_V   = L2_tau(min_i Qbar_i(s, a) - V(s))                            eq. 5
    L_Q   = sum_i (r + gamma (1 - done) V(s') - Q_i(s, a))^2             eq. 6
    L_pi  = -min(exp(beta (min_i Qbar_i(s, a) - V(s))), 100) log pi(a | s)   eq. 7

with L2_tau of `expectile_loss`, and Qbar the slow copies of Q. Each loss trains only what it is
named after: all else is a constant of it.
"""

import math

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import check_float

Array = jax.Array


def expectile_loss(difference: Array, expectile: float) -> Array:
  """|tau - 1(u < 0)| u^2 (section 4.1), least in the mean where u is a variable less its expectile.

  Args:
    difference: `[...]` float, u.
    expectile: tau in (0, 1); 0.5 is half the squared error, towards 1 it leans to the maximum.

  Returns:
    `[...]` float32.
  """
  check_float(difference=difference)
  difference = difference.astype(jnp.float32)
  weight = jnp.where(difference < 0, 1 - expectile, expectile)
  return weight * jnp.square(difference)


def value_loss(values: Array, target_q: Array, *, expectile: float) -> Array:
  """V is regressed to an upper expectile of Q over the actions in the data (eq. 5).

  Args:
    values: `[...]` float, V(s).
    target_q: `[...]` float, the smaller of the slow copies of Q at (s, a); a constant.
    expectile: tau of `expectile_loss` (0.7 for locomotion, 0.9 for mazes).

  Returns:
    `[...]` float32.
  """
  check_float(values=values, target_q=target_q)
  constant = jax.lax.stop_gradient(target_q.astype(jnp.float32))
  return expectile_loss(constant - values.astype(jnp.float32), expectile)


def q_loss(q: Array, rewards: Array, next_values: Array, not_done: Array, *, gamma: float) -> Array:
  """Every Q is regressed to the value of what followed (eq. 6), the errors of several Q summed.

  Args:
    q: `[K, ...]` float, K functions Q(s, a); the released code has two.
    rewards: `[...]` float.
    next_values: `[...]` float, V(s'); a constant, and not read where all was over.
    not_done: `[...]` bool, False where s' is terminal.
    gamma: discount in [0, 1].

  Returns:
    `[...]` float32.
  """
  check_float(q=q, rewards=rewards, next_values=next_values)
  following = jnp.where(not_done, next_values, 0.0).astype(jnp.float32)
  target = jax.lax.stop_gradient(rewards.astype(jnp.float32) + gamma * following)
  return jnp.square(target - q.astype(jnp.float32)).sum(0)


def advantage_weights(
  target_q: Array, values: Array, *, temperature: float, max_weight: float = 100.0
) -> Array:
  """min(exp(beta (Q - V)), max_weight), `[...]` float32 without gradient; never overflows."""
  check_float(target_q=target_q, values=values)
  advantage = target_q.astype(jnp.float32) - values.astype(jnp.float32)
  exponent = jnp.minimum(temperature * advantage, math.log(max_weight))
  return jax.lax.stop_gradient(jnp.exp(exponent))


def policy_loss(
  logprobs: Array,
  target_q: Array,
  values: Array,
  *,
  temperature: float,
  max_weight: float = 100.0,
) -> Array:
  """Advantage-weighted regression: actions are imitated the more, the better they are (eq. 7).

  Args:
    logprobs: `[...]` float, log pi(a | s).
    target_q: `[...]` float, the smaller of the slow copies of Q at (s, a); a constant.
    values: `[...]` float, V(s); a constant.
    temperature: beta >= 0, an inverse temperature; 0 is behaviour cloning (3 for locomotion, 10 for
      mazes).
    max_weight: where the weights are cut (100 in the released code).

  Returns:
    `[...]` float32.
  """
  check_float(logprobs=logprobs)
  weights = advantage_weights(target_q, values, temperature=temperature, max_weight=max_weight)
  return -weights * logprobs.astype(jnp.float32)
