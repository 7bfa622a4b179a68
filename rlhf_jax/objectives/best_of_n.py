"""Imitation of the best of several samples: rejection fine-tuning and expert iteration."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.metrics import Mean, Metrics
from rlhf_jax.common.types import Experience, Sequences
from rlhf_jax.objectives import sft
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
class BestOfNConfig:
  """Fine-tuning on the best of n samples."""

  # Responses to each prompt (16 in AlpacaFarm, Dubois et al. 2023).
  samples: int = 16
  # How many of them, the best by score, are imitated.
  keep: int = 1
  # Who samples: the frozen 'reference' (best-of-n or rejection fine-tuning; Touvron et al. 2023,
  # section 3.2.3), or the 'policy' as it is at that iteration (expert iteration, Anthony et al.
  # 2017; an iteration then is a round, batch_size its prompts).
  sample_from: str = 'reference'
  # Passes over the kept responses of an iteration, and optimizer updates in each pass.
  epochs: int = 1
  minibatches: int = 1

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    check_samples(path, self.samples, 'There is no best of one.')
    check_updates(path, self.epochs, self.minibatches, {})
    if not 1 <= self.keep < self.samples:
      raise ConfigError(f'{path}.keep', self.keep, f'an integer in [1, samples = {self.samples})')
    if self.sample_from not in ('reference', 'policy'):
      raise ConfigError(f'{path}.sample_from', self.sample_from, "'reference' or 'policy'")


def collect(config: BestOfNConfig, experience: Experience, carry: Carry) -> Collected:
  """Keeps the best responses to each prompt; of equal scores, those sampled first."""
  scores = grouped(experience.scores, config.samples)
  kept_scores, kept = jax.lax.top_k(scores, config.keep)
  rows = (kept + config.samples * jnp.arange(scores.shape[0])[:, None]).reshape(-1)
  metrics: Metrics = {'kept_score': Mean.of(kept_scores)}
  return Collected(jax.tree.map(lambda x: x[rows], experience.sequences), carry, metrics)


def loss(config: BestOfNConfig, actors: Actors, params: Params, batch: Sequences) -> LossOutput:
  """Mean negative log-likelihood of the kept responses' tokens."""
  del config
  return sft.loss(sft.SFTConfig(), actors, params, batch)


def demands(config: BestOfNConfig) -> Demands:
  """Updates of the kept responses to each prompt."""
  return Demands(
    epochs=config.epochs,
    minibatches=config.minibatches,
    samples=config.samples,
    rows=config.keep,
    sampler=config.sample_from,  # type: ignore[arg-type]
  )


OBJECTIVE = Objective(
  'best_of_n', BestOfNConfig, 'prompts', loss, always, collect=collect, demands=demands
)
