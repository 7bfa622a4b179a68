"""Group-relative policy optimisation: advantages from the rewards of a prompt's responses."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import check_float
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.masked import masked_mean, masked_sum
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
from rlhf_jax.objectives.policy_gradient import (
  MAX_LOG_RATIO,
  check_dual_clip,
  check_samples,
  check_updates,
  clipped_surrogate,
  grouped,
  ratio_metrics,
  rollouts_of,
)
from rlhf_jax.ops.kl import k3

Array = jax.Array

SCALES = ('group', 'batch', 'none')
NORMALIZATIONS = ('sequence', 'token', 'constant')


@dataclasses.dataclass(kw_only=True)
class GRPOConfig:
  """Group-relative policy optimisation (Shao et al. 2024, DeepSeekMath)."""

  # Responses to each prompt (64 in the paper; TRL: 8).
  samples: int = 8
  # Passes over the rollouts of an iteration, and minibatches (optimizer updates) in each pass.
  epochs: int = 1
  minibatches: int = 1
  # How far a token's probability ratio may fall and rise (TRL: 0.2 both; DAPO: 0.2
  # and 0.28).
  clip: float = 0.2
  clip_high: float = 0.2
  # The largest ratio that counts where the advantage is negative (`delta` in TRL; 3 in Ye et al.
  # 2020); 0 is none.
  dual_clip: float = 0.0
  # Of what the ratio is: of each 'token' (the paper), or of the whole 'sequence', its geometric
  # mean over tokens (Zheng et al. 2025, GSPO, whose clips are about 3e-4 and 4e-4).
  ratio: str = 'token'
  # Coefficient of the k3 estimate of the KL, in the loss (0.04 in the paper; TRL: 0).
  kl_coefficient: float = 0.04
  # What centred rewards are divided by: the standard deviation of the 'group' (the paper), of the
  # whole 'batch' (Liu et al. 2025, "Tricks or traps"), or 'none' (Liu et al. 2025, Dr. GRPO).
  scale: str = 'group'
  # Added to that deviation (TRL: 1e-4; verl: 1e-6; OpenRLHF: 1e-9).
  epsilon: float = 1e-4
  # How token losses become one number: mean over each response, then over responses, 'sequence'
  # (the paper; TRL 'grpo'); mean over all tokens, 'token' (Yu et al. 2025, DAPO; TRL 'bnpo',
  # 'dapo'); sum over a response divided by a 'constant' (Dr. GRPO; TRL 'dr_grpo').
  loss_normalization: str = 'sequence'
  # That constant, in tokens (TRL: the longest response); 'constant' only.
  constant: float = 0.0

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    check_samples(path, self.samples, "Advantages compare a prompt's responses with each other.")
    clips = {'clip': self.clip, 'clip_high': self.clip_high}
    check_updates(path, self.epochs, self.minibatches, clips)
    check_dual_clip(path, self.dual_clip, self.clip_high)
    if not self.kl_coefficient >= 0:
      raise ConfigError(f'{path}.kl_coefficient', self.kl_coefficient, 'a number >= 0')
    if not self.epsilon > 0:
      raise ConfigError(f'{path}.epsilon', self.epsilon, 'a number > 0')
    for name, kinds in (
      ('ratio', ('token', 'sequence')),
      ('scale', SCALES),
      ('loss_normalization', NORMALIZATIONS),
    ):
      if getattr(self, name) not in kinds:
        raise ConfigError(f'{path}.{name}', getattr(self, name), f'one of {kinds}')
    if (self.loss_normalization == 'constant') != (self.constant > 0):
      raise ConfigError(
        f'{path}.constant',
        self.constant,
        "a number > 0 with loss_normalization 'constant', and 0 otherwise",
      )


def group_advantages(rewards: Array, *, scale: str, epsilon: float = 1e-4) -> Array:
  """`[B, K]` rewards of K responses to each prompt -> `[B, K]` advantages.

    A_i = (R_i - mean R) / (std R + epsilon)     (Shao et al. 2024, section 4.1.2)

  The standard deviation divides by K - 1, as in TRL. A group of equal rewards has advantages of
  exactly 0: what rounding leaves of it would be divided by little more than epsilon.
  """
  check_float(rewards=rewards)
  centred = jnp.where(all_equal(rewards)[:, None], 0.0, rewards - rewards.mean(1, keepdims=True))
  if scale == 'group':
    return centred / (rewards.std(1, ddof=1, keepdims=True) + epsilon)
  if scale == 'batch':
    return centred / (rewards.std(ddof=1) + epsilon)
  if scale == 'none':
    return centred
  raise ValueError(f'scale {scale!r}: expected one of {SCALES}.')


def all_equal(rewards: Array) -> Array:
  """`[B, K]` -> `[B]` bool, the groups that teach nothing."""
  return rewards.max(1) == rewards.min(1)


def collect(config: GRPOConfig, experience: Experience, carry: Carry) -> Collected:
  """Standardises the scores of each prompt's responses; every token gets its response's."""
  groups = grouped(experience.scores, config.samples)
  advantages = group_advantages(groups, scale=config.scale, epsilon=config.epsilon).reshape(-1)
  metrics: Metrics = {
    'group_std': Mean.of(groups.std(1)),
    'equal_groups': Mean.of(all_equal(groups)),
  }
  return Collected(rollouts_of(experience, advantages), carry, metrics)


def loss(config: GRPOConfig, actors: Actors, params: Params, batch: Rollouts) -> LossOutput:
  """Clipped surrogate plus `kl_coefficient` k3, per token (Shao et al. 2024, eq. 3 and 4)."""
  mask = batch.sequences.response_mask
  assert actors.policy is not None
  output = actors.policy(params, batch.sequences)
  logprobs = jnp.where(mask, output.logprobs, batch.old_logprobs)
  clips = {'clip_low': config.clip, 'clip_high': config.clip_high}
  terms, old_terms = logprobs, batch.old_logprobs
  if config.ratio == 'sequence':
    means = masked_mean(logprobs - batch.old_logprobs, mask, axis=-1)[:, None]
    terms, old_terms = jnp.broadcast_to(means, mask.shape), jnp.zeros(mask.shape)
  advantages = jnp.where(mask, batch.advantages, 0.0)
  policy_losses = clipped_surrogate(
    terms, old_terms, advantages, dual_clip=config.dual_clip, **clips
  )
  # Where the reference is e^40 times likelier, the estimate's gradient would overflow.
  reference = jnp.minimum(batch.reference_logprobs, logprobs + MAX_LOG_RATIO)
  kl = k3(logprobs, jnp.where(mask, reference, logprobs))
  losses = policy_losses + config.kl_coefficient * kl
  mean = normalized(losses, mask, config.loss_normalization, config.constant)
  return mean, {
    'policy_loss': normalized(policy_losses, mask, config.loss_normalization, config.constant),
    'loss_kl': Mean.of(kl, mask),
    'entropy': Mean.of(output.entropy, mask),
    **ratio_metrics(terms, old_terms, mask, **clips),
  }


def normalized(losses: Array, mask: Array, normalization: str, constant: float = 0.0) -> Mean:
  """Token losses `[B, R]` as one mean; see `GRPOConfig.loss_normalization`."""
  if normalization == 'token':
    return Mean.of(losses, mask)
  if normalization == 'sequence':
    return Mean.of(masked_mean(losses, mask, axis=-1))
  if normalization == 'constant':
    return Mean.of(masked_sum(losses, mask, axis=-1) / constant)
  raise ValueError(f'normalization {normalization!r}: expected one of {NORMALIZATIONS}.')


def demands(config: GRPOConfig) -> Demands:
  """Updates of all responses to each prompt."""
  return Demands(
    epochs=config.epochs,
    minibatches=config.minibatches,
    samples=config.samples,
    rows=config.samples,
  )


OBJECTIVE = Objective('grpo', GRPOConfig, 'prompts', loss, always, collect=collect, demands=demands)
