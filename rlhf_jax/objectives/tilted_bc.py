"""Reward-weighted imitation of the reference's samples, towards the optimal policy."""

import dataclasses

import jax

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.metrics import Mean, Metrics
from rlhf_jax.common.types import Experience, Ratings
from rlhf_jax.objectives import weighted_bc
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
from rlhf_jax.objectives.policy_gradient import check_samples, check_updates, grouped

Array = jax.Array


@dataclasses.dataclass(kw_only=True)
class TiltedBCConfig:
  """Imitation of pi* ~ pi_ref exp(r / temperature), as self-normalised weights estimate it.

  What is imitated is pi* only in the limit of many samples; of K it is a flatter policy.
  """

  # beta of the optimal policy, in the units of the reward (Korbak et al. 2022).
  temperature: float = 1.0
  # The reference's responses to each prompt, whose weights sum to their number. That sum stands in
  # the place of the partition function, which flattens what is learnt: the fewer, the more.
  samples: int = 16
  # Passes over the responses of an iteration, and optimizer updates in each pass.
  epochs: int = 1
  minibatches: int = 1

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    check_samples(path, self.samples, 'The weight of one sample is 1, whatever its reward.')
    check_updates(path, self.epochs, self.minibatches, {})
    if not self.temperature > 0:
      raise ConfigError(f'{path}.temperature', self.temperature, 'a number > 0')


def collect(config: TiltedBCConfig, experience: Experience, carry: Carry) -> Collected:
  """All samples with their weights in the place of scores: samples * softmax(r / temperature)."""
  scores = grouped(experience.scores, config.samples)
  weights = config.samples * jax.nn.softmax(scores / config.temperature, axis=-1)
  # 1 / sum of squared shares: how many equally heavy samples would tell as much.
  effective = config.samples**2 / (weights**2).sum(-1)
  metrics: Metrics = {'effective_samples': Mean.of(effective)}
  return Collected(Ratings(experience.sequences, weights.reshape(-1)), carry, metrics)


def loss(config: TiltedBCConfig, actors: Actors, params: Params, batch: Ratings) -> LossOutput:
  """As `weighted_bc.loss`.

  Its expectation is least where pi(y) ~ pi_ref(y) E[w | y], with the weights w of `collect`. As
  samples grow that is pi*, the nearest in KL(pi* || pi); with few it is between pi* and pi_ref.
  """
  del config
  return weighted_bc.loss(weighted_bc.WeightedBCConfig(), actors, params, batch)


def demands(config: TiltedBCConfig) -> Demands:
  """The reference's samples, all of which are learnt from."""
  return Demands(
    epochs=config.epochs,
    minibatches=config.minibatches,
    samples=config.samples,
    rows=config.samples,
    sampler='reference',
  )


OBJECTIVE = Objective(
  'tilted_bc',
  TiltedBCConfig,
  'prompts',
  loss,
  always,
  collect=collect,
  demands=demands,
)
