"""The adaptive KL controller (Ziegler et al. 2019, section 2.2)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.objectives.kl_penalty import KLPenaltyConfig, next_coefficient

CONFIG = KLPenaltyConfig(target=6.0, horizon=10_000)


def updated(coefficient: float, kl: float, sequences: int = 500) -> float:
  """The next coefficient after sequences with that KL on average."""
  deviations = np.linspace(-1, 1, sequences)
  kls = jnp.asarray(kl + deviations, jnp.float32)
  return float(next_coefficient(CONFIG, jnp.float32(coefficient), kls))


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


def test_without_a_target_the_coefficient_stays() -> None:
  """To the bit, whatever the KL."""
  coefficient = jnp.float32(0.1)
  kept = next_coefficient(KLPenaltyConfig(), coefficient, jnp.full(8, 1e3))
  assert kept == coefficient


def test_holds_a_policy_at_its_target() -> None:
  """In closed loop with a policy whose KL is 3 / beta, the KL comes to the target from either side.

  KL ~ 1 / beta is how far the optimum of reward - beta KL moves, to first order.
  """

  def settle(coefficient: jax.Array) -> jax.Array:
    def step(beta: jax.Array, _: None) -> tuple[jax.Array, None]:
      return next_coefficient(CONFIG, beta, jnp.full(512, 3.0 / beta)), None

    return jax.lax.scan(step, coefficient, None, length=2000)[0]

  settled = jax.jit(jax.vmap(settle))(jnp.array([0.05, 5.0]))
  np.testing.assert_allclose(3.0 / settled, 6.0, rtol=0.01)


@pytest.mark.parametrize(
  ('settings', 'field'),
  [
    ({'coefficient': -0.1}, 'coefficient'),
    ({'target': -1.0}, 'target'),
    ({'horizon': 0}, 'horizon'),
    ({'target': 6.0, 'coefficient': 0.0}, 'coefficient'),
  ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], field: str) -> None:
  """A controller that multiplies cannot leave 0; no penalty at all is fine."""
  with pytest.raises(ConfigError) as error:
    KLPenaltyConfig(**settings).validate('objective.kl')
  assert error.value.field == f'objective.kl.{field}'
  KLPenaltyConfig(coefficient=0.0).validate('objective.kl')
