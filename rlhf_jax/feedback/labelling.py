"""Simulated annotators: noisy choices between pairs of scored responses, and noisy rankings."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from rlhf_jax.common.errors import ConfigError

Array = np.ndarray

MODELS = ('bradley_terry', 'regret')


@dataclasses.dataclass(kw_only=True)
class LabelConfig:
  """How simulated annotators choose."""

  # What they compare: 'bradley_terry', the reward of each response (Bradley & Terry 1952), or
  # 'regret', its reward plus what may still come of it where it was cut off (Knox et al. 2022; the
  # preference model that CPL assumes).
  model: str = 'bradley_terry'
  # Nats of score that make odds of e : 1; 0 is a choice without noise. 0.5 makes the best possible
  # accuracy on the embedded task 0.88.
  temperature: float = 0.5
  # Probability that a choice is recorded the wrong way round, in [0, 0.5).
  flip_rate: float = 0.0
  # How many annotators share the work, each pair being one annotator's.
  annotators: int = 1
  # Standard deviation of the logarithm of the annotators' own temperatures.
  annotator_spread: float = 0.0
  # Temperature of the soft-optimal value that the regret model adds, in nats; 'regret' only. Below
  # about 3 the embedded task's values do not converge (`data.reviews.soft_value`).
  regret_beta: float = 4.0
  # Continuations drawn to estimate each such value, the error being part of what annotators see;
  # 'regret' only.
  regret_samples: int = 64

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if self.model not in MODELS:
      raise ConfigError(f'{path}.model', self.model, f'one of {MODELS}')
    if not 0 <= self.temperature < math.inf:
      raise ConfigError(f'{path}.temperature', self.temperature, 'a number >= 0')
    if not 0 <= self.flip_rate < 0.5:
      raise ConfigError(
        f'{path}.flip_rate',
        self.flip_rate,
        'a number in [0, 0.5)',
        'From 0.5 on, labels say nothing or the opposite.',
      )
    for name in ('annotators', 'regret_samples'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'an integer >= 1')
    if not 0 <= self.annotator_spread < math.inf:
      raise ConfigError(f'{path}.annotator_spread', self.annotator_spread, 'a number >= 0')
    if self.annotator_spread > 0 and self.annotators == 1:
      raise ConfigError(
        f'{path}.annotator_spread',
        self.annotator_spread,
        'annotators > 1',
        'A population of one has no spread: raise annotators, or set the spread to 0.',
      )
    if not 0 < self.regret_beta < math.inf:
      raise ConfigError(f'{path}.regret_beta', self.regret_beta, 'a number > 0')


class Labels(NamedTuple):
  """Choices between the two responses of `[N]` pairs.

  Attributes:
    first: `[N]` bool, the first is recorded as preferred.
    probability: `[N]` float64, the probability that this very label would be recorded.
    annotator: `[N]` int, whose choice it is.
  """

  first: Array
  probability: Array
  annotator: Array


def population(config: LabelConfig, rng: np.random.Generator) -> Array:
  """`[annotators]` float64: their temperatures, log-normal about `config.temperature`."""
  return config.temperature * np.exp(
    config.annotator_spread * rng.standard_normal(config.annotators)
  )


def label(scores: Array, temperatures: Array, flip_rate: float, rng: np.random.Generator) -> Labels:
  """Labels pairs as p(first) = f + (1 - 2 f) sigmoid((score_1 - score_2) / temperature).

  Args:
    scores: `[N, 2]` float, in nats.
    temperatures: `[A]`, of the annotators; each pair is given to one of them at random.
    flip_rate: f, the probability that a choice is recorded the wrong way round.
    rng: source of the draws.
  """
  annotator = rng.integers(len(temperatures), size=len(scores))
  gap = scores[:, 0] - scores[:, 1]
  with np.errstate(divide='ignore', invalid='ignore'):  # temperature 0: the ratio is infinite
    ratio = np.where(gap == 0, 0.0, gap / temperatures[annotator])
  wins = flip_rate + (1 - 2 * flip_rate) * np.exp(-np.logaddexp(0.0, -ratio))
  first = rng.random(len(scores)) < wins
  return Labels(first, np.where(first, wins, 1 - wins), annotator)


class Orders(NamedTuple):
  """Rankings of `[N, K]` responses.

  Attributes:
    rank: `[N, K]` int, 1 the best; every row has the numbers from 1 to K.
    annotator: `[N]` int, whose order it is.
  """

  rank: Array
  annotator: Array


def rank(scores: Array, temperatures: Array, flip_rate: float, rng: np.random.Generator) -> Orders:
  """Draws orders from p(y_1 > ... > y_K) = prod_k e^(s_k / T) / sum_(j >= k) e^(s_j / T).

  The Plackett-Luce model (Plackett 1975), exactly: the order of s + T g with independent standard
  Gumbel g (Yellott 1977). With K = 2 it is the model of `label`.

  Args:
    scores: `[N, K]` float, in nats.
    temperatures: `[A]`, of the annotators; each row is given to one of them at random.
    flip_rate: the probability that an order is recorded the wrong way round, from worst to best.
    rng: source of the draws.
  """
  annotator = rng.integers(len(temperatures), size=len(scores))
  noisy = scores + temperatures[annotator][:, None] * rng.gumbel(size=scores.shape)
  flipped = rng.random(len(scores)) < flip_rate
  best_first = np.argsort(np.where(flipped[:, None], noisy, -noisy), axis=1, kind='stable')
  return Orders(1 + np.argsort(best_first, axis=1), annotator)


def bayes_accuracy(probability: Array) -> float:
  """The accuracy on these labels of one who knows how they arise: the mean of max(p, 1 - p).

  `probability` is `[N]`, that of each label (or of its opposite: it makes no difference).
  """
  return float(np.maximum(probability, 1 - probability).mean())
