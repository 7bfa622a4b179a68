"""Advantage estimators over response tokens."""

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import check_float, check_shapes

Array = jax.Array


def gae(
  rewards: Array, values: Array, mask: Array, *, gamma: float, lam: float
) -> tuple[Array, Array]:
  """Generalised advantage estimation (Schulman et al. 2016, eq. 11-16) over right-padded rows.

    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1}

  The state after the last unmasked position is terminal: its value is 0. Masked positions are
  skipped: their rewards and values are never read, and their outputs are 0.

  Args:
    rewards: `[B, R]` float.
    values: `[B, R]` float, value of the state before each token.
    mask: `[B, R]` bool, True on a prefix of each row.
    gamma: discount, in [0, 1].
    lam: trace decay, in [0, 1].

  Returns:
    advantages and returns (`advantages + values`), `[B, R]` float32.
  """
  check_shapes('rewards:BR values:BR mask:BR', rewards=rewards, values=values, mask=mask)
  check_float(rewards=rewards, values=values)
  rewards = jnp.where(mask, rewards, 0.0).astype(jnp.float32)
  values = jnp.where(mask, values, 0.0).astype(jnp.float32)
  next_values = jnp.concatenate([values[:, 1:], jnp.zeros_like(values[:, :1])], axis=1)
  deltas = rewards + gamma * next_values - values

  def backwards(advantage: Array, delta: Array) -> tuple[Array, Array]:
    advantage = delta + gamma * lam * advantage
    return advantage, advantage

  _, advantages = jax.lax.scan(backwards, jnp.zeros_like(deltas[:, 0]), deltas.T, reverse=True)
  advantages = jnp.where(mask, advantages.T, 0.0)
  return advantages, jnp.where(mask, advantages + values, 0.0)


def discounted_sum(values: Array, mask: Array, gamma: float) -> Array:
  """`sum_t gamma^t values_t` over unmasked positions of right-padded rows, `[..., R] -> [...]`."""
  discounts = gamma ** jnp.arange(values.shape[-1], dtype=jnp.float32)
  return jnp.where(mask, values * discounts, 0.0).sum(-1)
