"""REINFORCE on whole responses, with a baseline."""

import dataclasses

import jax
import jax.numpy as jnp

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
  check_unread,
)
from rlhf_jax.objectives.kl_penalty import KLPenaltyConfig, next_coefficient
from rlhf_jax.objectives.policy_gradient import rollouts_of, sequence_kl
from rlhf_jax.objectives.rloo import leave_one_out

Array = jax.Array

BASELINES = ('none', 'batch', 'running')


@dataclasses.dataclass(kw_only=True)
class ReinforceConfig:
  """REINFORCE (Williams 1992): one update on each batch of samples."""

  # What is taken off the rewards: 'none'; 'batch', the mean reward of the other responses of the
  # iteration; 'running', a moving average over the iterations before (Ahmadian et al. 2024, eq. 8,
  # is the plain mean of all rewards so far).
  baseline: str = 'running'
  # What the moving average keeps of itself in an iteration (0.9: about ten iterations).
  baseline_decay: float = 0.9
  # The penalty on the KL of the whole response, inside its reward.
  kl: KLPenaltyConfig = dataclasses.field(default_factory=KLPenaltyConfig)

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if self.baseline not in BASELINES:
      raise ConfigError(f'{path}.baseline', self.baseline, f'one of {BASELINES}')
    if not 0 <= self.baseline_decay < 1:
      raise ConfigError(f'{path}.baseline_decay', self.baseline_decay, 'a number in [0, 1)')
    if self.baseline != 'running':
      check_unread(self, path, ('baseline_decay',), f'with baseline {self.baseline!r}')
    self.kl.validate(f'{path}.kl')


def collect(config: ReinforceConfig, experience: Experience, carry: Carry) -> Collected:
  """Takes the KL off each response's score, and the baseline off that.

  The moving average starts as the first iteration's mean, which is then that iteration's baseline.
  """
  coefficient, kl = carry['kl_coefficient'], sequence_kl(experience)
  rewards = experience.scores - coefficient * kl
  mean, started = rewards.mean(), carry['started']
  baseline = jnp.where(started > 0, carry['baseline'], mean)
  if config.baseline == 'batch':
    advantages = leave_one_out(rewards[None])[0]
  else:
    advantages = rewards - (baseline if config.baseline == 'running' else 0.0)
  metrics: Metrics = {
    'kl_coefficient': Mean.of(coefficient),
    'objective': Mean.of(rewards),
    'baseline': Mean.of(rewards - advantages),
  }
  following = {
    'kl_coefficient': next_coefficient(config.kl, coefficient, kl),
    'baseline': config.baseline_decay * baseline + (1 - config.baseline_decay) * mean,
    'started': jnp.ones_like(started),
  }
  return Collected(rollouts_of(experience, advantages), following, metrics)


def loss(config: ReinforceConfig, actors: Actors, params: Params, batch: Rollouts) -> LossOutput:
  """-A log pi(y | x), mean over responses; the log-prob is the sum over the response's tokens."""
  del config
  mask = batch.sequences.response_mask
  assert actors.policy is not None
  output = actors.policy(params, batch.sequences)
  logprobs = jnp.where(mask, output.logprobs, 0.0)
  mean = Mean.of(masked_sum(-batch.advantages * logprobs, mask, axis=-1))
  return mean, {'policy_loss': mean, 'entropy': Mean.of(output.entropy, mask)}


def demands(config: ReinforceConfig) -> Demands:
  """The batch's mean is a baseline of several responses."""
  return Demands(compares_rows=config.baseline == 'batch')


OBJECTIVE = Objective(
  'reinforce',
  ReinforceConfig,
  'prompts',
  loss,
  always,
  collect=collect,
  carry=lambda config: {
    'kl_coefficient': config.kl.coefficient,
    'baseline': 0.0,
    'started': 0.0,
  },
  demands=demands,
)
