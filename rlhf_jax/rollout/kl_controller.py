"""The adaptive coefficient of the KL penalty."""

import jax
import jax.numpy as jnp

Array = jax.Array


def update_coefficient(
  coefficient: Array, sequence_kl: Array, *, target: float, horizon: int, sequences: int
) -> Array:
  """Proportional controller in log space (Ziegler et al. 2019, section 2.2).

    e = clip(KL / target - 1, -0.2, 0.2),   beta' = beta (1 + e n / horizon)

  Args:
    coefficient: float32 scalar, beta.
    sequence_kl: mean over responses of their summed k1, in nats.
    target: sequence KL aimed at, in nats.
    horizon: sequences over which a full error changes beta by about a fifth.
    sequences: n, sequences sampled since the last update.
  """
  error = jnp.clip(sequence_kl / target - 1, -0.2, 0.2)
  return coefficient * (1 + error * sequences / horizon)
