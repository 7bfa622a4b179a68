"""Proximal policy optimisation with a value function and a KL penalty."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import check_float, check_shapes
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.masked import masked_sum
from rlhf_jax.common.metrics import FirstMax, Max, Mean, Min
from rlhf_jax.common.types import Rollouts
from rlhf_jax.objectives.base import Actors, LossOutput, Objective, Params
from rlhf_jax.ops.kl import k2

Array = jax.Array

# Log-ratios are cut here: the gradient of a float32 ratio that overflows is nan even where the
# ratio is clipped away (0 * inf).
MAX_LOG_RATIO = 40.0


@dataclasses.dataclass(kw_only=True)
class PPOConfig:
  """PPO for language models (Schulman et al. 2017; Ziegler et al. 2019; Huang et al. 2024)."""

  # Passes over the rollouts of an iteration, and minibatches (optimizer updates) in each pass.
  epochs: int = 4
  minibatches: int = 1
  # Discount and trace decay of the advantage estimator.
  gamma: float = 1.0
  lam: float = 0.95
  # Clipping of the probability ratio and of the value function's move, and the value loss's weight.
  clip: float = 0.2
  value_clip: float = 0.2
  value_coefficient: float = 0.1
  # Initial (and, without a target, constant) coefficient of the per-token penalty -beta k1.
  kl_coefficient: float = 0.05
  # Sequence KL in nats that the adaptive controller aims at; 0 keeps the coefficient fixed.
  kl_target: float = 0.0
  # The controller's horizon in sampled sequences.
  kl_horizon: int = 10_000
  # Rewards are scaled to unit variance and keep their mean; advantages lose theirs.
  whiten_rewards: bool = False
  whiten_advantages: bool = True
  # Where the score is paid: 'last_token' of the response; 'after_stop', the step after the stop
  # token, with the value mask one step longer (Huang et al. 2024); 'last_position', the end of the
  # response block (Ziegler et al. 2019, whose responses have a fixed length).
  score_placement: str = 'last_token'
  # Responses that never stopped: 'none' leaves their score, 'replace' puts missing_stop_value in
  # its place (-1 in Huang et al. 2024), 'subtract' takes missing_stop_value off (TRL: 1).
  missing_stop: str = 'none'
  missing_stop_value: float = -1.0
  # Scoring only: cut the response after the first such token at or after the given position; the
  # policy trains on the uncut response, and one without it counts as never stopped (Ziegler et al.
  # 2019: token 13 after position 16). -1 is off.
  score_truncation_token: int = -1
  score_truncation_after: int = 0
  # 'shared': a value head on the policy's trunk; 'separate': a trunk of its own, copied from the
  # policy; 'reward_model': trunk and head copied from the reward model.
  value_model: str = 'shared'
  # Who scores: 'reward_model', or 'task', the embedded task's gold reward.
  reward: str = 'reward_model'
  # Also measure the exact per-token KL from full logits (costs one `[B, R, V]` array twice).
  exact_kl: bool = False

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    for name in ('epochs', 'minibatches', 'kl_horizon'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'an integer >= 1')
    for name in ('gamma', 'lam'):
      if not 0 <= getattr(self, name) <= 1:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'a number in [0, 1]')
    for name in ('clip', 'value_clip'):
      if not getattr(self, name) > 0:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'a number > 0')
    for name in ('value_coefficient', 'kl_coefficient', 'kl_target'):
      if not getattr(self, name) >= 0:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'a number >= 0')
    choices = {
      'score_placement': ('last_token', 'after_stop', 'last_position'),
      'missing_stop': ('none', 'replace', 'subtract'),
      'value_model': ('shared', 'separate', 'reward_model'),
      'reward': ('reward_model', 'task'),
    }
    for name, kinds in choices.items():
      if getattr(self, name) not in kinds:
        raise ConfigError(f'{path}.{name}', getattr(self, name), f'one of {kinds}')
    if self.kl_target > 0 and self.kl_coefficient == 0:
      raise ConfigError(
        f'{path}.kl_coefficient',
        self.kl_coefficient,
        'a number > 0 with a kl_target',
        'The adaptive controller multiplies the coefficient: 0 would stay 0.',
      )
    if self.missing_stop == 'subtract' and self.missing_stop_value <= 0:
      raise ConfigError(
        f'{path}.missing_stop_value',
        self.missing_stop_value,
        "a number > 0 with missing_stop 'subtract'",
        'Taking a negative number off would reward responses that never stop.',
      )
    if self.value_model == 'reward_model' and self.reward == 'task':
      raise ConfigError(
        f'{path}.value_model',
        self.value_model,
        "'shared' or 'separate' when the task itself gives the reward",
      )


def policy_loss(logprobs: Array, old_logprobs: Array, advantages: Array, *, clip: float) -> Array:
  """Clipped surrogate (Schulman et al. 2017, eq. 7), `[B, R]` float32, to be minimised.

  max(-A rho, -A clip(rho, 1 - clip, 1 + clip)),   rho = exp(logprobs - old_logprobs)
  """
  check_shapes(
    'logprobs:BR old:BR advantages:BR', logprobs=logprobs, old=old_logprobs, advantages=advantages
  )
  check_float(advantages=advantages)
  ratio = jnp.exp(jnp.minimum(logprobs - old_logprobs, MAX_LOG_RATIO))
  return jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1 - clip, 1 + clip))


def value_loss(values: Array, old_values: Array, returns: Array, *, clip: float) -> Array:
  """Clipped value loss (Ziegler et al. 2019, released code), `[B, R]` float32.

  0.5 max((V - G)^2, (V_old + clip(V - V_old, -clip, clip) - G)^2)
  """
  check_shapes('values:BR old:BR returns:BR', values=values, old=old_values, returns=returns)
  check_float(values=values, returns=returns)
  clipped = old_values + jnp.clip(values - old_values, -clip, clip)
  return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns))


def loss(config: PPOConfig, actors: Actors, params: Params, batch: Rollouts) -> LossOutput:
  """Policy loss plus `value_coefficient` times the value loss, per response token.

  Both terms are totals over their own masks, divided by the number of response tokens. (With
  'after_stop' the value mask is one step longer; the paper's code divides that term by its own
  count, a factor of n / (n + rows) on the coefficient.)
  """
  mask = batch.sequences.response_mask
  check_shapes(
    'mask:BR value_mask:BR advantages:BR',
    mask=mask,
    value_mask=batch.value_mask,
    advantages=batch.advantages,
  )
  assert actors.policy is not None
  output = actors.policy(params, batch.sequences)
  assert output.values is not None, 'PPO needs a policy with a value function'
  # Masked positions hold arbitrary log-probs: they must not overflow before they are masked.
  logprobs = jnp.where(mask, output.logprobs, batch.old_logprobs)
  values = jnp.where(batch.value_mask, output.values, batch.old_values)
  policy_losses = policy_loss(logprobs, batch.old_logprobs, batch.advantages, clip=config.clip)
  value_losses = value_loss(values, batch.old_values, batch.returns, clip=config.value_clip)
  total = masked_sum(policy_losses, mask) + config.value_coefficient * masked_sum(
    value_losses, batch.value_mask
  )
  logratio = logprobs - batch.old_logprobs
  ratio = jnp.exp(logratio)
  moved = jnp.abs(ratio - 1)
  return Mean(total, mask.sum().astype(jnp.float32)), {
    'policy_loss': Mean.of(policy_losses, mask),
    'value_loss': Mean.of(value_losses, batch.value_mask),
    'value_clip_fraction': Mean.of(
      jnp.abs(values - batch.old_values) > config.value_clip, batch.value_mask
    ),
    'clip_fraction': Mean.of(moved > config.clip, mask),
    'approximate_kl': Mean.of(k2(logprobs, batch.old_logprobs), mask),
    'entropy': Mean.of(output.entropy, mask),
    'ratio': Mean.of(ratio, mask),
    'ratio_max': Max.of(ratio, mask),
    'ratio_min': Min.of(ratio, mask),
    'first_ratio_deviation': FirstMax.of(moved, mask),
  }


OBJECTIVE = Objective('ppo', PPOConfig, 'prompts', loss, lambda config: True)
