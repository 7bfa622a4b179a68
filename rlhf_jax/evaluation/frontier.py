"""The optimal reward-KL frontier: the most gold reward that any policy can have at a given KL.

Among all policies whose KL to a reference is at most k (nats a sequence, mean over prompts), the
best has pi*(y|x) ~ pi_ref(y|x) exp(r(x, y) / beta) with one beta for all prompts; its reward is

    F(k) = min over beta of  beta (k + E_x log Z_x(beta)),
    Z_x(beta) = E_{y ~ pi_ref} exp(r(x, y) / beta),

the dual of the constrained problem (Boyd and Vandenberghe 2004, chapter 5; for this policy: Korbak
et al. 2022). Each beta alone gives a line above F, so log Z bounds the reward of every policy, and
F is concave. Here Z_x is estimated from N samples of the reference for each prompt.

Bias. The log of a mean of N weights is too low on average, by about (1/ESS - 1/N) / 2 nats, where
ESS = (sum w)^2 / sum w^2 is the effective number of samples; that term is added back. What remains
is of second order (rewards that are normal with deviation 3, N = 1024: 0.1 too low in 7.5 at the
end of the curve, 0.01 in the middle), but ESS itself is judged by the samples that were drawn: a
rare, very good response that was never drawn makes the estimate too low without a sign of it. The
KL of a self-normalised estimate cannot exceed log N, and is unreliable long before: the curve ends
where the harmonic mean over prompts of ESS, on which the bias depends, falls under `min_effective`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.evaluation import statistics
from rlhf_jax.evaluation.statistics import Interval

# Steps in beta: 7% apart, which costs under 0.1% of the gain in reward, from a KL of 1e-4 nats on.
_BETA_RATIO = 0.93
_BETA_STEPS = 160
_SMALLEST_KL = 1e-4


@dataclasses.dataclass(frozen=True)
class FrontierPoint:
  """One point of the frontier.

  Attributes:
    kl: nats a sequence, averaged over prompts.
    gold_reward: the optimum at this very KL, with its interval over prompts.
    beta: the KL penalty whose optimal policy this is; None for the reference itself.
    effective_samples: harmonic mean over prompts of the effective number of samples.
  """

  kl: float
  gold_reward: Interval
  beta: float | None
  effective_samples: float

  def to_dict(self) -> dict[str, Any]:
    return {
      'kl': self.kl,
      'gold_reward': self.gold_reward.to_dict(),
      'beta': self.beta,
      'effective_samples': self.effective_samples,
    }

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> 'FrontierPoint':
    return cls(
      fields['kl'],
      Interval.from_dict(fields['gold_reward']),
      fields.get('beta'),
      fields.get('effective_samples', float('nan')),
    )


@dataclasses.dataclass(frozen=True)
class _Dual:
  """What the frontier is made of, for M decreasing values of beta."""

  betas: np.ndarray  # [M]
  log_partition: np.ndarray  # [P, M] estimates of log Z_x(beta)
  kl: np.ndarray  # [M] mean over prompts
  effective: np.ndarray  # [M] harmonic mean over prompts


def optimal_frontier(
  rewards: np.ndarray,
  *,
  points: int = 40,
  min_effective: float = 10.0,
  replicates: int = 1000,
  seed: int = 0,
) -> list[FrontierPoint]:
  """Estimates the frontier from `[P, N]` gold rewards of N reference samples for each of P prompts.

  The first point is the reference itself (KL 0, the mean reward); the others are evenly spaced in
  sqrt(KL), near to which the frontier is straight. Intervals are percentiles of the frontier at
  that KL over `replicates` bootstrap draws of the prompts, and hold the noise of the samples too,
  as that is drawn anew with each prompt. See the module for the bias and for where the curve ends.
  Raises ValueError for another shape, fewer than 2 prompts or samples, or rewards not finite.
  """
  rewards = np.asarray(rewards, np.float64)
  if rewards.ndim != 2 or min(rewards.shape) < 2:
    raise ValueError(f'rewards: expected [prompts, samples], at least 2 of each: {rewards.shape}.')
  if not np.isfinite(rewards).all():
    raise ValueError('rewards: expected finite numbers.')
  means = rewards.mean(1)
  drawn = statistics.bootstrap_means(means, replicates, seed)
  start = statistics.percentile_interval(float(means.mean()), drawn)
  frontier = [FrontierPoint(0.0, start, None, float(rewards.shape[1]))]
  dual = _solve_dual(rewards, min_effective)
  if dual.betas.size == 0:  # no prompt has two responses of different reward
    return frontier
  mean_log_partition = dual.log_partition.mean(0)
  drawn = statistics.bootstrap_means(dual.log_partition, replicates, seed)
  for kl in np.linspace(0.0, np.sqrt(dual.kl[-1]), points)[1:] ** 2:
    lines = dual.betas * (kl + mean_log_partition)
    best = int(lines.argmin())
    curves = (dual.betas * (kl + drawn)).min(1)
    gold = statistics.percentile_interval(float(lines[best]), curves)
    frontier.append(
      FrontierPoint(float(kl), gold, float(dual.betas[best]), float(dual.effective[best]))
    )
  return frontier


def frontier_at(frontier: Sequence[FrontierPoint], kl: float) -> Interval:
  """The optimum at one KL: linear in sqrt(KL) between points, an upper bound past the last one.

  The frontier is concave, so past its end it stays under the line through its last two points. A KL
  below zero, which an estimate may have, is taken as zero.
  """
  if not frontier:
    raise ValueError('frontier: expected at least one point.')
  kl = max(kl, 0.0)
  kls = [point.kl for point in frontier]
  ends = np.asarray([dataclasses.astuple(point.gold_reward) for point in frontier])  # [M, 3]
  if kl > kls[-1] and len(frontier) > 1:
    slope = max((ends[-1, 0] - ends[-2, 0]) / (kls[-1] - kls[-2]), 0.0)
    return Interval(*(float(end + slope * (kl - kls[-1])) for end in ends[-1]))
  return Interval(*(float(np.interp(np.sqrt(kl), np.sqrt(kls), column)) for column in ends.T))


def above_frontier(kl: Interval, gold_reward: Interval, frontier: Sequence[FrontierPoint]) -> bool:
  """Whether a measured policy is better than the best possible, beyond all intervals.

  Its lowest credible reward is compared with the highest credible optimum at its highest credible
  KL. True means that some estimate (reward, KL or optimum) is wrong.
  """
  return gold_reward.low > frontier_at(frontier, kl.high).high


def _solve_dual(rewards: np.ndarray, min_effective: float) -> _Dual:
  """Weighs the samples at decreasing beta until too few of them carry the weight."""
  samples = rewards.shape[1]
  scale = float(np.sqrt(rewards.var(1).mean()))
  betas: list[float] = []
  log_partitions: list[np.ndarray] = []
  kls: list[float] = []
  effectives: list[float] = []
  # For small tilts KL is the variance of r / beta, halved: the first beta gives the smallest KL.
  beta = scale / np.sqrt(2 * _SMALLEST_KL)
  top = rewards.max(1, keepdims=True)
  for _ in range(_BETA_STEPS if scale > 0 else 0):
    weights = np.exp((rewards - top) / beta)
    total = weights.sum(1)
    weights /= total[:, None]
    inverse_effective = np.square(weights).sum(1)
    if 1 / inverse_effective.mean() < min_effective:
      break
    log_partition = top[:, 0] / beta + np.log(total / samples)
    kl = float(((weights * rewards).sum(1) / beta - log_partition).mean())
    if kls and kl <= kls[-1] * (1 + 1e-6):  # all weight is on the best responses already
      break
    betas.append(beta)
    log_partitions.append(log_partition + (inverse_effective - 1 / samples) / 2)
    kls.append(kl)
    effectives.append(float(1 / inverse_effective.mean()))
    beta *= _BETA_RATIO
  return _Dual(
    np.asarray(betas),
    np.stack(log_partitions, 1) if log_partitions else np.zeros((rewards.shape[0], 0)),
    np.asarray(kls),
    np.asarray(effectives),
  )
