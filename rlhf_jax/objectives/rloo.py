"""REINFORCE with a leave-one-out baseline over several responses to each prompt."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import check_float
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.masked import masked_sum
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
from rlhf_jax.objectives.grpo import group_advantages
from rlhf_jax.objectives.kl_penalty import KLPenaltyConfig, next_coefficient
from rlhf_jax.objectives.policy_gradient import (
  check_samples,
  check_updates,
  clipped_surrogate,
  grouped,
  ratio_metrics,
  rollouts_of,
  sequence_kl,
)

Array = jax.Array


@dataclasses.dataclass(kw_only=True)
class RLOOConfig:
  """REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024)."""

  # Responses to each prompt (2 or 4 in Ahmadian et al. 2024).
  samples: int = 4
  # Passes over the rollouts of an iteration, and minibatches (optimizer updates) in each pass.
  epochs: int = 1
  minibatches: int = 1
  # The penalty on the KL of the whole response, inside its reward.
  kl: KLPenaltyConfig = dataclasses.field(default_factory=KLPenaltyConfig)
  # What is clipped: the probability ratio of whole responses, 'sequence' (one response is one
  # action, as in the paper and in TRL), or of each 'token', as in PPO.
  ratio: str = 'sequence'
  clip: float = 0.2
  # Bring advantages to mean 0 and standard deviation 1 over the batch (TRL's
  # `normalize_advantages`: the deviation of the count less one, plus 1e-4).
  whiten_advantages: bool = False

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    check_samples(path, self.samples, 'The baseline is the mean reward of the other responses.')
    check_updates(path, self.epochs, self.minibatches, {'clip': self.clip})
    self.kl.validate(f'{path}.kl')
    if self.ratio not in ('sequence', 'token'):
      raise ConfigError(f'{path}.ratio', self.ratio, "'sequence' or 'token'")


def leave_one_out(rewards: Array) -> Array:
  """`[B, K]` rewards of K responses to each prompt -> `[B, K]` advantages.

  A_i = R_i - mean over j != i of R_j     (Ahmadian et al. 2024, section 3.3)

  Raises ValueError for K = 1, whose response has no others.
  """
  check_float(rewards=rewards)
  samples = rewards.shape[1]
  if samples < 2:
    raise ValueError(f'{samples} response: a leave-one-out baseline takes at least 2.')
  return (rewards - rewards.mean(1, keepdims=True)) * (samples / (samples - 1))


def collect(config: RLOOConfig, experience: Experience, carry: Carry) -> Collected:
  """Takes the KL off each response's score, and the others' mean off that."""
  coefficient, kl = carry['kl_coefficient'], sequence_kl(experience)
  rewards = experience.scores - coefficient * kl
  advantages = leave_one_out(grouped(rewards, config.samples)).reshape(-1)
  if config.whiten_advantages:
    advantages = group_advantages(advantages[None], scale='group')[0]
  metrics: Metrics = {
    'kl_coefficient': Mean.of(coefficient),
    'objective': Mean.of(rewards),
    'group_std': Mean.of(grouped(experience.scores, config.samples).std(1)),
  }
  following = next_coefficient(config.kl, coefficient, kl)
  return Collected(rollouts_of(experience, advantages), {'kl_coefficient': following}, metrics)


def loss(config: RLOOConfig, actors: Actors, params: Params, batch: Rollouts) -> LossOutput:
  """The clipped surrogate: mean over responses of one term each, or mean over tokens."""
  mask = batch.sequences.response_mask
  assert actors.policy is not None
  output = actors.policy(params, batch.sequences)
  logprobs = jnp.where(mask, output.logprobs, batch.old_logprobs)
  clips = {'clip_low': config.clip, 'clip_high': config.clip}
  terms, old_terms, of = logprobs, batch.old_logprobs, mask
  if config.ratio == 'sequence':
    terms = masked_sum(logprobs, mask, axis=-1)[:, None]
    old_terms = masked_sum(batch.old_logprobs, mask, axis=-1)[:, None]
    of = mask.any(-1, keepdims=True)
  losses = clipped_surrogate(terms, old_terms, batch.advantages[:, : terms.shape[1]], **clips)
  mean = Mean.of(losses, of)
  return mean, {
    'policy_loss': mean,
    'entropy': Mean.of(output.entropy, mask),
    **ratio_metrics(terms, old_terms, of, **clips),
  }


def demands(config: RLOOConfig) -> Demands:
  """Updates of all responses to each prompt."""
  return Demands(
    epochs=config.epochs,
    minibatches=config.minibatches,
    samples=config.samples,
    rows=config.samples,
  )


OBJECTIVE = Objective(
  'rloo',
  RLOOConfig,
  'prompts',
  loss,
  always,
  collect=collect,
  carry=lambda config: {'kl_coefficient': config.kl.coefficient},
  demands=demands,
)
