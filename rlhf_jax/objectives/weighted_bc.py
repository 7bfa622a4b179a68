"""Behaviour cloning of the better responses: filtered by score, or weighted with it."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.metrics import Mean
from rlhf_jax.common.types import Ratings
from rlhf_jax.objectives.base import (
  Actors,
  Curated,
  LossOutput,
  Objective,
  Params,
  check_unread,
)

Array = jax.Array

VARIANTS = ('filtered', 'weighted')


@dataclasses.dataclass(kw_only=True)
class WeightedBCConfig:
  """Filtered behaviour cloning (%BC, Chen et al. 2021) and reward-weighted regression."""

  # 'filtered': the best `keep` of all responses, alike; 'weighted': all responses, by
  # exp(score / temperature) (Peters & Schaal 2007).
  variant: str = 'filtered'
  # Fraction of the responses that is imitated (10% in Chen et al. 2021); 'filtered' only.
  keep: float = 0.1
  # In the units of the scores (1 in Peng et al. 2019, released code); 'weighted' only.
  temperature: float = 1.0
  # The largest weight, in units of their mean before it is cut (Peng et al. 2019 clip at 20);
  # 'weighted' only.
  max_weight: float = 20.0

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if self.variant not in VARIANTS:
      raise ConfigError(f'{path}.variant', self.variant, f'one of {VARIANTS}')
    if not 0 < self.keep <= 1:
      raise ConfigError(f'{path}.keep', self.keep, 'a fraction in (0, 1]')
    if not self.temperature > 0:
      raise ConfigError(f'{path}.temperature', self.temperature, 'a number > 0')
    if not self.max_weight >= 1:
      raise ConfigError(f'{path}.max_weight', self.max_weight, 'a number >= 1')
    unread = ('temperature', 'max_weight') if self.variant == 'filtered' else ('keep',)
    check_unread(self, path, unread, f'with variant {self.variant!r}')


def curate(
  config: WeightedBCConfig, scores: np.ndarray, baselines: Callable[[], np.ndarray]
) -> Curated:
  """Weights `[N]` in the place of scores: 1 for what is kept, or exp(score / temperature) / mean.

  Of equal scores at the edge of the filter, those listed first are kept.
  """
  del baselines
  if config.variant == 'filtered':
    count = max(round(config.keep * len(scores)), 1)
    keep = np.zeros(len(scores), bool)
    keep[np.argsort(-scores, kind='stable')[:count]] = True
    return Curated(np.ones(len(scores)), keep)
  weights = np.exp((scores - scores.max()) / config.temperature)
  weights = np.minimum(weights / weights.mean(), config.max_weight)
  return Curated(weights, np.ones(len(scores), bool))


def loss(config: WeightedBCConfig, actors: Actors, params: Params, batch: Ratings) -> LossOutput:
  """Negative log-likelihood of response tokens, each times its response's weight; mean over tokens.

  `batch.score` holds the weights. The mean divides by the number of tokens, not by their weights.
  """
  del config
  mask = batch.sequences.response_mask
  assert actors.policy is not None
  output = actors.policy(params, batch.sequences)
  weighted = -output.logprobs * batch.score[:, None]
  return Mean.of(weighted, mask), {
    'nll': Mean.of(-output.logprobs, mask),
    'entropy': Mean.of(output.entropy, mask),
    'weight': Mean.of(batch.score),
    'weight_squared': Mean.of(jnp.square(batch.score)),
  }


OBJECTIVE = Objective('weighted_bc', WeightedBCConfig, 'ratings', loss, curate=curate)
