"""Online DPO: preferences between a policy's own responses, given by the reward."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.masked import masked_sum
from rlhf_jax.common.metrics import Mean, Metrics
from rlhf_jax.common.types import Experience, Pairs, Sequences
from rlhf_jax.objectives.base import (
  Actors,
  Carry,
  Collected,
  Demands,
  LossOutput,
  Objective,
  Params,
  always,
  pair_logprobs,
)
from rlhf_jax.objectives.dpo import dpo
from rlhf_jax.objectives.policy_gradient import check_samples, check_updates, grouped
from rlhf_jax.objectives.reward_model import preference_metrics

Array = jax.Array

VARIANTS = ('sigmoid', 'ipo', 'hinge')


@dataclasses.dataclass(kw_only=True)
class OnlineDPOConfig:
  """Online DPO (Guo et al. 2024, "Direct language model alignment from online AI feedback")."""

  # Responses to each prompt; the best and the worst by score make the pair (2 in the paper).
  samples: int = 2
  # Passes over the rollouts of an iteration, and minibatches (optimizer updates) in each pass.
  epochs: int = 1
  minibatches: int = 1
  # Strength of the tie to the reference (0.1 in TRL).
  beta: float = 0.1
  # As in DPO: 'sigmoid', 'ipo' or 'hinge' (the paper's three).
  variant: str = 'sigmoid'

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    check_samples(path, self.samples, 'A pair takes two responses.')
    check_updates(path, self.epochs, self.minibatches, {})
    if not self.beta > 0:
      raise ConfigError(f'{path}.beta', self.beta, 'a number > 0')
    if self.variant not in VARIANTS:
      raise ConfigError(f'{path}.variant', self.variant, f'one of {VARIANTS}')


def collect(config: OnlineDPOConfig, experience: Experience, carry: Carry) -> Collected:
  """Pairs the best and the worst response to each prompt; `margin` is what their scores differ by.

  Of equal scores the first response counts; a group of equal scores makes a pair of margin 0, which
  says nothing and has no weight in the loss.
  """
  scores = grouped(experience.scores, config.samples)
  chosen = jnp.stack([scores.argmax(1), scores.argmin(1)], axis=1)
  rows = chosen + config.samples * jnp.arange(scores.shape[0])[:, None]
  best, worst = jnp.take_along_axis(scores, chosen, axis=1).T
  sampled = experience.sequences
  # Samples of one prompt are neighbours: both responses share what stands before the first.
  sequences = Sequences(
    sampled.prompt[:: config.samples, None],
    sampled.prompt_mask[:: config.samples, None],
    sampled.response[rows],
    sampled.response_mask[rows],
  )
  pairs = Pairs(
    sequences=sequences,
    preference=jnp.ones_like(best),
    margin=best - worst,
    reference_logprobs=experience.reference_logprobs[rows],
  )
  metrics: Metrics = {'score_gap': Mean.of(best - worst), 'equal_groups': Mean.of(best == worst)}
  return Collected(pairs, carry, metrics)


def loss(config: OnlineDPOConfig, actors: Actors, params: Params, batch: Pairs) -> LossOutput:
  """DPO loss, mean over pairs whose scores differ."""
  assert batch.reference_logprobs is not None, 'collect keeps what the reference said'
  mask = batch.sequences.response_mask
  logratios = masked_sum(
    pair_logprobs(actors, params, batch) - batch.reference_logprobs, mask, axis=-1
  )
  losses = dpo(logratios, batch.preference, beta=config.beta, variant=config.variant)
  told_apart = batch.margin > 0
  mean = Mean.of(losses, told_apart)
  margin = config.beta * (logratios[:, 0] - logratios[:, 1])
  # A pair whose scores are equal is a labelled tie.
  labels = jnp.where(told_apart, batch.preference, 0.5)
  return mean, {
    'accuracy': preference_metrics(margin, labels)['accuracy'],
    'implicit_reward_margin': Mean.of(margin, told_apart),
  }


def demands(config: OnlineDPOConfig) -> Demands:
  """Updates of one pair from each prompt."""
  return Demands(
    epochs=config.epochs, minibatches=config.minibatches, samples=config.samples, rows=1
  )


OBJECTIVE = Objective(
  'online_dpo', OnlineDPOConfig, 'prompts', loss, always, collect=collect, demands=demands
)
