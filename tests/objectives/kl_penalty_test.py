"""The adaptive KL controller (Ziegler et al. 2019, section 2.2)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rollout.kl_controller import update_coefficient


def updated(coefficient: float, kl: float, target: float = 6.0, sequences: int = 500) -> float:
  """The next coefficient, with a horizon of 10,000 sequences."""
  return float(
    update_coefficient(
      jnp.float32(coefficient),
      jnp.float32(kl),
      target=target,
      horizon=10_000,
      sequences=sequences,
    )
  )


@pytest.mark.parametrize(
  ('kl', 'factor'),
  [
    (6.0, 1.0),  # on target
    (6.6, 1.005),  # error 0.1, times 500 / 10,000
    (5.4, 0.995),
    (60.0, 1.01),  # error clipped to 0.2
    (0.0, 0.99),  # error clipped to -0.2
    (-3.0, 0.99),  # an estimate of the KL may be negative
  ],
)
def test_worked_by_hand(kl: float, factor: float) -> None:
  """beta (1 + clip(KL / 6 - 1, -0.2, 0.2) n / 10,000) from beta 0.15, as in the released code."""
  np.testing.assert_allclose(updated(0.15, kl), 0.15 * factor, rtol=1e-6)


def test_twice_the_sequences_move_twice_as_far() -> None:
  """The horizon is counted in sequences, not in updates."""
  one, two = updated(1.0, 9.0, sequences=250) - 1, updated(1.0, 9.0, sequences=500) - 1
  np.testing.assert_allclose(two, 2 * one, rtol=1e-4)


def test_holds_a_policy_at_its_target() -> None:
  """In closed loop with a policy whose KL is 3 / beta, the KL comes to the target from either side.

  KL ~ 1 / beta is how far the optimum of reward - beta KL moves, to first order.
  """

  def settle(coefficient: jax.Array) -> jax.Array:
    def step(beta: jax.Array, _: None) -> tuple[jax.Array, None]:
      return update_coefficient(beta, 3.0 / beta, target=6.0, horizon=10_000, sequences=512), None

    return jax.lax.scan(step, coefficient, None, length=2000)[0]

  settled = jax.jit(jax.vmap(settle))(jnp.array([0.05, 5.0]))
  np.testing.assert_allclose(3.0 / settled, 6.0, rtol=0.01)
