"""Proximal policy optimisation with a value function and a KL penalty."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import check_float, check_shapes
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.masked import masked_mean, masked_sum, masked_variance, whiten
from rlhf_jax.common.metrics import Mean, Metrics
from rlhf_jax.common.types import Experience, Rollouts
from rlhf_jax.objectives.base import (
  Actors,
  Carry,
  Collected,
  Demands,
  LossOutput,
  Objective,
  Params,
  always,
)
from rlhf_jax.objectives.kl_penalty import KLPenaltyConfig, next_coefficient
from rlhf_jax.objectives.policy_gradient import (
  check_updates,
  clipped_surrogate,
  log_ratios,
  ratio_metrics,
  rollouts_of,
  sequence_kl,
)
from rlhf_jax.objectives.shaping import PLACEMENTS, token_rewards
from rlhf_jax.ops.advantages import gae

Array = jax.Array


@dataclasses.dataclass(kw_only=True)
class PPOConfig:
  """PPO for language models (Schulman et al. 2017; Ziegler et al. 2019; Huang et al. 2024)."""

  # Passes over the rollouts of an iteration, and minibatches (optimizer updates) in each pass (4
  # and 1 in Ziegler et al. 2019, released code; 4 in Huang et al. 2024).
  epochs: int = 4
  minibatches: int = 1
  # Discount and trace decay of the advantage estimator (1 and 0.95 in Ziegler et al. 2019 and
  # Huang et al. 2024).
  gamma: float = 1.0
  lam: float = 0.95
  # Clipping of the probability ratio and of the value function's move, and the value loss's weight
  # (0.2, 0.2 and 0.1 in Ziegler et al. 2019, released code).
  clip: float = 0.2
  value_clip: float = 0.2
  value_coefficient: float = 0.1
  # What the value loss is divided by: 'response_tokens', as the policy loss is, or 'own', the
  # positions it is a sum over (Huang et al. 2024 and TRL, whose 'after_stop' has one more a
  # response), counted over an iteration.
  value_normalization: str = 'response_tokens'
  # The per-token penalty -beta k1.
  kl: KLPenaltyConfig = dataclasses.field(default_factory=KLPenaltyConfig)
  # Rewards are scaled to unit variance and keep their mean; advantages lose theirs.
  whiten_rewards: bool = False
  whiten_advantages: bool = True
  # The variance they are divided by is that of the count (Ziegler et al. 2019; Huang et al. 2024);
  # True: that of the count less one (TRL's PPO).
  unbiased_variance: bool = False
  # Where the score is paid: 'last_token' of the response; 'after_stop', the step after the stop
  # token, with the value mask one step longer (Huang et al. 2024); 'last_position', the end of the
  # response block (Ziegler et al. 2019, whose responses have a fixed length).
  score_placement: str = 'last_token'
  # 'shared': a value head on the policy's trunk; 'separate': a trunk of its own, copied from the
  # policy; 'reward_model': trunk and head copied from the reward model.
  value_model: str = 'shared'

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    check_updates(
      path, self.epochs, self.minibatches, {'clip': self.clip, 'value_clip': self.value_clip}
    )
    for name in ('gamma', 'lam'):
      if not 0 <= getattr(self, name) <= 1:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'a number in [0, 1]')
    if not self.value_coefficient >= 0:
      raise ConfigError(f'{path}.value_coefficient', self.value_coefficient, 'a number >= 0')
    self.kl.validate(f'{path}.kl')
    for name, kinds in (
      ('score_placement', PLACEMENTS),
      ('value_normalization', ('response_tokens', 'own')),
      ('value_model', ('shared', 'separate', 'reward_model')),
    ):
      if getattr(self, name) not in kinds:
        raise ConfigError(f'{path}.{name}', getattr(self, name), f'one of {kinds}')


def value_loss(values: Array, old_values: Array, returns: Array, *, clip: float) -> Array:
  """Clipped value loss (Ziegler et al. 2019, released code), `[B, R]` float32.

  0.5 max((V - G)^2, (V_old + clip(V - V_old, -clip, clip) - G)^2)
  """
  check_shapes('values:BR old:BR returns:BR', values=values, old=old_values, returns=returns)
  check_float(values=values, returns=returns)
  clipped = old_values + jnp.clip(values - old_values, -clip, clip)
  return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns))


def whitened(config: PPOConfig, values: Array, mask: Array, *, keep_mean: bool) -> Array:
  """`whiten` with the variance that the config asks for, `[B, R]` float32."""
  result = whiten(values, mask, keep_mean=False)
  if config.unbiased_variance:
    count = mask.sum().astype(jnp.float32)
    result = result * jnp.sqrt(jnp.maximum(count - 1, 1.0) / count)
  return jnp.where(mask, result + masked_mean(values, mask), 0.0) if keep_mean else result


def collect(config: PPOConfig, experience: Experience, carry: Carry) -> Collected:
  """Shapes the rewards and estimates advantages and returns (Schulman et al. 2016)."""
  assert experience.values is not None, 'PPO needs a value function'
  mask, coefficient = experience.sequences.response_mask, carry['kl_coefficient']
  shaped = token_rewards(experience, -coefficient * log_ratios(experience), config.score_placement)
  rewards = shaped.rewards
  if config.whiten_rewards:
    rewards = whitened(config, rewards, shaped.value_mask, keep_mean=True)
  advantages, returns = gae(
    rewards, experience.values, shaped.value_mask, gamma=config.gamma, lam=config.lam
  )
  if config.whiten_advantages:
    advantages = whitened(config, advantages, mask, keep_mean=False)
  rollouts = dataclasses.replace(
    rollouts_of(experience, advantages),
    old_values=experience.values,
    returns=returns,
    value_mask=shaped.value_mask,
  )
  if config.value_normalization == 'own':
    scale = mask.sum(dtype=jnp.float32) / shaped.value_mask.sum(dtype=jnp.float32)
    rollouts = dataclasses.replace(rollouts, value_scale=jnp.full(experience.scores.shape, scale))
  errors = returns - experience.values
  explained = 1 - masked_variance(errors, shaped.value_mask) / jnp.maximum(
    masked_variance(returns, shaped.value_mask), 1e-8
  )
  kl = sequence_kl(experience)
  metrics: Metrics = {
    'kl_coefficient': Mean.of(coefficient),
    'objective': Mean.of(experience.scores - coefficient * kl),
    'returns': Mean.of(returns, shaped.value_mask),
    'values': Mean.of(experience.values, shaped.value_mask),
    'explained_variance': Mean.of(explained),
  }
  following = next_coefficient(config.kl, coefficient, kl)
  return Collected(rollouts, {'kl_coefficient': following}, metrics)


def loss(config: PPOConfig, actors: Actors, params: Params, batch: Rollouts) -> LossOutput:
  """Policy loss plus `value_coefficient` times the value loss, per response token.

  Both terms are totals over their own masks, divided by the number of response tokens. With
  `value_normalization='own'` the second is multiplied by n / n_value, the two masks' sums over the
  whole iteration (with 'after_stop' the value mask is one step longer).
  """
  mask = batch.sequences.response_mask
  assert actors.policy is not None
  assert batch.old_values is not None and batch.returns is not None
  assert batch.value_mask is not None
  check_shapes(
    'mask:BR value_mask:BR advantages:BR',
    mask=mask,
    value_mask=batch.value_mask,
    advantages=batch.advantages,
  )
  output = actors.policy(params, batch.sequences)
  assert output.values is not None, 'PPO needs a policy with a value function'
  # Masked positions hold arbitrary log-probs: they must not overflow before they are masked.
  logprobs = jnp.where(mask, output.logprobs, batch.old_logprobs)
  values = jnp.where(batch.value_mask, output.values, batch.old_values)
  clips = {'clip_low': config.clip, 'clip_high': config.clip}
  policy_losses = clipped_surrogate(logprobs, batch.old_logprobs, batch.advantages, **clips)
  value_losses = value_loss(values, batch.old_values, batch.returns, clip=config.value_clip)
  weighted = config.value_coefficient * value_losses
  if config.value_normalization == 'own':
    assert batch.value_scale is not None
    weighted = weighted * batch.value_scale[:, None]
  total = masked_sum(policy_losses, mask) + masked_sum(weighted, batch.value_mask)
  return Mean(total, mask.sum().astype(jnp.float32)), {
    'policy_loss': Mean.of(policy_losses, mask),
    'value_loss': Mean.of(value_losses, batch.value_mask),
    'value_clip_fraction': Mean.of(
      jnp.abs(values - batch.old_values) > config.value_clip, batch.value_mask
    ),
    'entropy': Mean.of(output.entropy, mask),
    **ratio_metrics(logprobs, batch.old_logprobs, mask, **clips),
  }


def demands(config: PPOConfig) -> Demands:
  """Updates of one response to each prompt, and a value function."""
  return Demands(
    epochs=config.epochs,
    minibatches=config.minibatches,
    value=config.value_model,  # type: ignore[arg-type]
    fixed_length=config.score_placement == 'last_position',
  )


OBJECTIVE = Objective(
  'ppo',
  PPOConfig,
  'prompts',
  loss,
  always,
  collect=collect,
  carry=lambda config: {'kl_coefficient': config.kl.coefficient},
  demands=demands,
)
