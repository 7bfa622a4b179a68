"""Means with 95% intervals: over prompts, and over prompts and training seeds together.

Prompts are the unit of every interval here, not samples or tokens: completions of one prompt share
its difficulty, so counting them as independent would make intervals too narrow.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

LEVEL = 0.95


def t_quantile(probability: float, freedom: float) -> float:
  """Quantile of Student's t distribution with that many degrees of freedom."""
  from scipy import stats  # takes a second

  return float(stats.t.ppf(probability, freedom))


@dataclasses.dataclass(frozen=True)
class Interval:
  """An estimate and the ends of its confidence interval, all in the unit of what was measured."""

  mean: float
  low: float
  high: float

  def to_dict(self) -> dict[str, float]:
    return {'mean': self.mean, 'low': self.low, 'high': self.high}

  @classmethod
  def from_dict(cls, fields: Mapping[str, float]) -> 'Interval':
    return cls(fields['mean'], fields['low'], fields['high'])

  def overlaps(self, other: 'Interval') -> bool:
    return self.low <= other.high and other.low <= self.high


def per_prompt(samples: np.ndarray) -> np.ndarray:
  """`[P]` or `[P, K]` (K completions a prompt) -> `[P]` float64 means; ValueError unless finite."""
  values = np.asarray(samples, np.float64)
  if values.ndim not in (1, 2) or values.shape[0] < 2 or values.size == 0:
    raise ValueError(f'expected [P] or [P, K] with P >= 2 prompts, got shape {values.shape}.')
  if not np.isfinite(values).all():
    raise ValueError(f'{int((~np.isfinite(values)).sum())} of {values.size} values are not finite.')
  return values if values.ndim == 1 else values.mean(1)


def mean_interval(samples: np.ndarray, level: float = LEVEL) -> Interval:
  """Student's t interval of the mean over prompts.

  `samples` is `[P]`, or `[P, K]` with K completions a prompt, which are averaged first. ValueError
  for fewer than two prompts or values that are not finite.
  """
  return pooled_interval(per_prompt(samples)[None], level)


def pooled_interval(samples: np.ndarray, level: float = LEVEL) -> Interval:
  """Interval of the mean of `[S, P]` samples: S training seeds, all on the same P prompts.

  Seeds and prompts are crossed random effects, and both are drawn from something larger. The
  variance of the grand mean is estimated by var(seed means) / S + var(prompt means) / P, with the
  degrees of freedom of Satterthwaite (1946, Biometrics Bulletin 2). A t interval over the S seed
  means alone would treat the prompts, which all seeds share, as if they were all there are. The
  variance of the interaction is counted twice, so intervals are a little wide rather than narrow.
  With one seed only the prompts remain: nothing is then known of how training varies.
  """
  values = np.asarray(samples, np.float64)
  if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] < 2:
    raise ValueError(f'expected [S, P] with P >= 2 prompts, got shape {values.shape}.')
  variance, freedom = _variance_of_mean(values)
  mean = float(values.mean())
  half = float(t_quantile(0.5 + level / 2, freedom) * np.sqrt(variance)) if variance > 0 else 0.0
  return Interval(mean, mean - half, mean + half)


def proportion_interval(samples: np.ndarray, level: float = LEVEL) -> Interval:
  """Interval of a rate from `[S, P]` outcomes in [0, 1]: a win 1, a tie 1/2, a loss 0.

  Wilson's score interval (1927) at the effective number of outcomes p (1 - p) / var(mean), as
  surveys with clustered answers do (Korn and Graubard 1998), with the t quantile for the normal
  one. It stays inside [0, 1] and keeps a width when every outcome is the same, where the number of
  prompts is taken. ValueError for outcomes outside [0, 1].
  """
  values = np.asarray(samples, np.float64)
  if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] < 2:
    raise ValueError(f'expected [S, P] with P >= 2 prompts, got shape {values.shape}.')
  if not ((values >= 0) & (values <= 1)).all():
    raise ValueError('expected outcomes between 0 (loss) and 1 (win).')
  rate = float(values.mean())
  variance, freedom = _variance_of_mean(values)
  if variance > 0:
    count = min(rate * (1 - rate) / variance, float(values.size))
  else:
    count, freedom = float(values.shape[1]), float(values.shape[1] - 1)
  z2 = t_quantile(0.5 + level / 2, freedom) ** 2
  centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
  half = np.sqrt(z2 * (rate * (1 - rate) / count + z2 / (4 * count * count))) / (1 + z2 / count)
  return Interval(rate, max(0.0, float(centre - half)), min(1.0, float(centre + half)))


def ratio_interval(totals: np.ndarray, counts: np.ndarray, level: float = LEVEL) -> Interval:
  """Interval of sum(totals) / sum(counts) over records, such as nats over tokens; both `[N]`.

  Student's t at the linearised variance N / (N - 1) sum (total - ratio count)^2 / sum(counts)^2
  (Cochran 1977, Sampling Techniques, section 6.4). ValueError for fewer than two records, or counts
  that sum to nothing.
  """
  totals, counts = np.asarray(totals, np.float64), np.asarray(counts, np.float64)
  if totals.ndim != 1 or totals.shape != counts.shape or len(totals) < 2:
    raise ValueError(f'expected two [N] with N >= 2, got shapes {totals.shape}, {counts.shape}.')
  if not counts.sum() > 0:
    raise ValueError('expected counts that sum to more than 0.')
  ratio = float(totals.sum() / counts.sum())
  number = len(totals)
  variance = number / (number - 1) * np.square(totals - ratio * counts).sum() / counts.sum() ** 2
  half = float(t_quantile(0.5 + level / 2, number - 1) * np.sqrt(variance))
  return Interval(ratio, ratio - half, ratio + half)


def bootstrap_means(values: np.ndarray, replicates: int, seed: int) -> np.ndarray:
  """`[P, ...]` -> `[replicates, ...]` means over prompts drawn with replacement.

  All trailing entries of a replicate share its prompts, so a whole curve is resampled at once.
  """
  rng = np.random.default_rng(seed)
  prompts = values.shape[0]
  counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=replicates)
  return np.tensordot(counts / prompts, np.asarray(values, np.float64), axes=1)


def percentile_interval(mean: float, replicates: np.ndarray, level: float = LEVEL) -> Interval:
  """The percentile bootstrap interval around an estimate, widened if need be to contain it."""
  low, high = np.quantile(replicates, [0.5 - level / 2, 0.5 + level / 2])
  return Interval(mean, min(float(low), mean), max(float(high), mean))


def _variance_of_mean(values: np.ndarray) -> tuple[float, float]:
  """The estimated variance of the mean of `[S, P]` values, and its degrees of freedom."""
  seeds, prompts = values.shape
  over_prompts = float(values.mean(0).var(ddof=1)) / prompts
  if seeds == 1:
    return over_prompts, float(prompts - 1)
  over_seeds = float(values.mean(1).var(ddof=1)) / seeds
  variance = over_seeds + over_prompts
  if variance == 0:
    return 0.0, float(prompts - 1)
  spread = over_seeds**2 / (seeds - 1) + over_prompts**2 / (prompts - 1)
  return variance, variance**2 / spread
