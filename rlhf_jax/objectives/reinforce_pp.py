"""REINFORCE++: PPO's update without a value function, on globally whitened returns."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.masked import masked_mean, whiten
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
from rlhf_jax.objectives.grpo import normalized
from rlhf_jax.objectives.kl_penalty import KLPenaltyConfig, next_coefficient
from rlhf_jax.objectives.policy_gradient import (
  check_dual_clip,
  check_samples,
  check_updates,
  clipped_surrogate,
  grouped,
  log_ratios,
  ratio_metrics,
  rollouts_of,
  sequence_kl,
)
from rlhf_jax.objectives.shaping import token_rewards
from rlhf_jax.ops.advantages import gae
from rlhf_jax.ops.kl import k2

Array = jax.Array


@dataclasses.dataclass(kw_only=True)
class ReinforcePPConfig:
  """REINFORCE++ (Hu et al. 2025)."""

  # Responses to each prompt.
  samples: int = 1
  # REINFORCE++-baseline: the mean score of a prompt's responses is taken off each of them first.
  group_baseline: bool = False
  # Passes over the rollouts of an iteration, and minibatches (optimizer updates) in each pass.
  epochs: int = 1
  minibatches: int = 1
  # Discount of the returns.
  gamma: float = 1.0
  # How far a token's probability ratio may fall and rise (0.2 in OpenRLHF).
  clip: float = 0.2
  # The largest ratio that counts where the advantage is negative (3 in Ye et al. 2020); 0 is none.
  dual_clip: float = 0.0
  # Returns are divided by their standard deviation over all tokens; False: only their mean is taken
  # off (OpenRLHF's `no_std_norm`).
  scale: bool = True
  # How token losses become one number, as in `GRPOConfig`: 'token' (the paper) or 'sequence'.
  loss_normalization: str = 'token'
  # The per-token penalty -beta k1 (0.01 in OpenRLHF), or, with kl_in_loss, beta k2 in the loss as
  # REINFORCE++-baseline has it.
  kl: KLPenaltyConfig = dataclasses.field(default_factory=lambda: KLPenaltyConfig(coefficient=0.01))
  kl_in_loss: bool = False

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if self.samples < 1:
      raise ConfigError(f'{path}.samples', self.samples, 'an integer >= 1')
    if self.group_baseline:
      check_samples(path, self.samples, "group_baseline is the mean of a prompt's responses.")
    check_updates(path, self.epochs, self.minibatches, {'clip': self.clip})
    check_dual_clip(path, self.dual_clip, self.clip)
    if not 0 <= self.gamma <= 1:
      raise ConfigError(f'{path}.gamma', self.gamma, 'a number in [0, 1]')
    if self.loss_normalization not in ('token', 'sequence'):
      raise ConfigError(
        f'{path}.loss_normalization', self.loss_normalization, "'token' or 'sequence'"
      )
    self.kl.validate(f'{path}.kl')
    if self.kl_in_loss and self.kl.target > 0:
      raise ConfigError(f'{path}.kl.target', self.kl.target, '0 with kl_in_loss')


def collect(config: ReinforcePPConfig, experience: Experience, carry: Carry) -> Collected:
  """Discounted returns of the penalised rewards, whitened over all tokens (Hu et al. 2025, sec. 3).

  A_t = whiten(sum_{k >= t} gamma^(k - t) r_k),   r_k = -beta k1_k, plus the score at the end
  """
  mask, coefficient = experience.sequences.response_mask, carry['kl_coefficient']
  paid = 0.0 if config.kl_in_loss else coefficient
  kl, scores = sequence_kl(experience), experience.scores
  if config.group_baseline:
    groups = grouped(scores, config.samples)
    experience = dataclasses.replace(
      experience, scores=(groups - groups.mean(1, keepdims=True)).reshape(-1)
    )
  rewards = token_rewards(experience, -paid * log_ratios(experience), 'last_token').rewards
  # With values of 0 and without decay of the trace, the advantages are the returns.
  returns, _ = gae(rewards, jnp.zeros_like(rewards), mask, gamma=config.gamma, lam=1.0)
  if config.scale:
    advantages = whiten(returns, mask, keep_mean=False)
  else:
    advantages = returns - masked_mean(returns, mask)
  metrics: Metrics = {
    'kl_coefficient': Mean.of(coefficient),
    'objective': Mean.of(scores - coefficient * kl),
    'returns': Mean.of(returns, mask),
  }
  following = next_coefficient(config.kl, coefficient, kl)
  return Collected(rollouts_of(experience, advantages), {'kl_coefficient': following}, metrics)


def loss(config: ReinforcePPConfig, actors: Actors, params: Params, batch: Rollouts) -> LossOutput:
  """PPO's clipped policy loss, and the penalty where it belongs here, mean over response tokens."""
  mask = batch.sequences.response_mask
  assert actors.policy is not None
  output = actors.policy(params, batch.sequences)
  logprobs = jnp.where(mask, output.logprobs, batch.old_logprobs)
  clips = {'clip_low': config.clip, 'clip_high': config.clip}
  policy_losses = clipped_surrogate(
    logprobs, batch.old_logprobs, batch.advantages, dual_clip=config.dual_clip, **clips
  )
  penalties = k2(logprobs, jnp.where(mask, batch.reference_logprobs, logprobs))
  weight = config.kl.coefficient if config.kl_in_loss else 0.0
  return normalized(policy_losses + weight * penalties, mask, config.loss_normalization), {
    'policy_loss': normalized(policy_losses, mask, config.loss_normalization),
    'entropy': Mean.of(output.entropy, mask),
    **ratio_metrics(logprobs, batch.old_logprobs, mask, **clips),
  }


def demands(config: ReinforcePPConfig) -> Demands:
  """Updates of all responses to each prompt."""
  return Demands(
    epochs=config.epochs,
    minibatches=config.minibatches,
    samples=config.samples,
    rows=config.samples,
  )


OBJECTIVE = Objective(
  'reinforce_pp',
  ReinforcePPConfig,
  'prompts',
  loss,
  always,
  collect=collect,
  carry=lambda config: {'kl_coefficient': config.kl.coefficient},
  demands=demands,
)
