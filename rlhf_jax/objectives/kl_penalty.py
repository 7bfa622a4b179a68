"""The penalty for leaving the reference: its coefficient, fixed or steered towards a target."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.common.errors import ConfigError

Array = jax.Array


@dataclasses.dataclass(kw_only=True)
class KLPenaltyConfig:
  """How strongly the KL to the reference is taken off the reward."""

  # Initial (and, without a target, constant) coefficient beta (0.05 in Huang et al. 2024;
  # 0.01 in OpenRLHF's REINFORCE++).
  coefficient: float = 0.05
  # Sequence KL in nats that the adaptive controller aims at; 0 keeps the coefficient fixed.
  target: float = 0.0
  # The controller's horizon in sampled sequences (Ziegler et al. 2019).
  horizon: int = 10_000

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    for name in ('coefficient', 'target'):
      if not getattr(self, name) >= 0:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'a number >= 0')
    if self.horizon < 1:
      raise ConfigError(f'{path}.horizon', self.horizon, 'an integer >= 1')
    if self.target > 0 and self.coefficient == 0:
      raise ConfigError(
        f'{path}.coefficient',
        self.coefficient,
        'a number > 0 with a target',
        'The adaptive controller multiplies the coefficient: 0 would stay 0.',
      )


def next_coefficient(config: KLPenaltyConfig, coefficient: Array, sequence_kl: Array) -> Array:
  """The coefficient of the next iteration: a proportional controller in log space.

    e = clip(KL / target - 1, -0.2, 0.2),   beta' = beta (1 + e n / horizon)

  (Ziegler et al. 2019, section 2.2.) Without a target it stays.

  Args:
    config: target and horizon.
    coefficient: float32 scalar, beta.
    sequence_kl: `[n]` float32, the k1 of each response of this iteration summed over its tokens, in
      nats.
  """
  if config.target == 0:
    return coefficient
  error = jnp.clip(sequence_kl.mean() / config.target - 1, -0.2, 0.2)
  return coefficient * (1 + error * sequence_kl.shape[0] / config.horizon)
