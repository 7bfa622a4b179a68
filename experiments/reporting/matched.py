"""Objectives at equal KL: the gold reward of each where its own run first spent a budget."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.reporting import evaluations as evaluations_lib
from rlhf_jax.evaluation import frontier as frontier_lib
from rlhf_jax.evaluation import statistics
from rlhf_jax.evaluation.frontier import FrontierPoint
from rlhf_jax.evaluation.statistics import Interval

_LADDER = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


def matched_kl(
  evaluations: Sequence[Mapping[str, Any]],
  optimum: Sequence[FrontierPoint],
  budgets: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
  """One entry for each objective and KL budget (nats a sequence) that all its seeds reached.

  `evaluations` as `evaluations.read` gives them; `budgets` None takes the steps of a ladder of
  round numbers. An entry has `objective`, `kl`, `gold_reward` (an interval over seeds and prompts)
  and, with an optimum, `optimum`, `gap` (optimum minus gold reward; its interval takes the two as
  independent, which is wide, as they share prompts) and `share`, the part of the possible gain over
  the start that was gained.
  """
  start = evaluations_lib.pools(evaluations, evaluations_lib.START)
  entries = []
  for objective in evaluations_lib.objectives(evaluations):
    if objective == evaluations_lib.START:
      continue
    rows = [row for row in evaluations if row['objective'] == objective]
    curves = [
      _curve([row for row in rows if row['seed'] == seed], start[-1] if start else None)
      for seed in sorted({row['seed'] for row in rows})
    ]
    for budget in _LADDER if budgets is None else budgets:
      found = [_gold_at(kl, gold, budget) for kl, gold in curves]
      values = [gold for gold in found if gold is not None]
      if len(values) == len(curves):
        gold = statistics.pooled_interval(np.stack(values))
        entries.append(_entry(objective, budget, gold, optimum, start[-1] if start else None))
  return entries


def _curve(
  rows: Sequence[Mapping[str, Any]], start: evaluations_lib.Pool | None
) -> tuple[np.ndarray, np.ndarray]:
  """One seed's KL and gold reward along its run, `[M, P]` each, from the start on."""
  kl = [row['kl'] for row in rows]
  gold = [row['gold_reward'] for row in rows]
  if start is not None and rows[0]['step'] > 0:
    kl.insert(0, np.zeros_like(kl[0]))
    gold.insert(0, start.values['gold_reward'].mean(0))
  return np.stack(kl), np.stack(gold)


def _gold_at(kl: np.ndarray, gold: np.ndarray, budget: float) -> np.ndarray | None:
  """Gold reward `[P]` where a run's mean KL first reaches `budget`, or None if it never does.

  Between two evaluations it is linear in sqrt(KL): for small changes of a policy the reward moves
  with the change and KL with its square. The KL is an estimate too: each prompt's deviation from
  the mean KL, times the slope of the curve, is taken off its reward, so that the spread over
  prompts is that of the reward at a fixed KL (the delta method).
  """
  means = kl.mean(1)
  for before, after in zip(range(means.size - 1), range(1, means.size), strict=True):
    if means[before] < budget <= means[after]:
      root = np.sqrt(np.maximum(means[[before, after]], 0.0))
      part = (np.sqrt(budget) - root[0]) / (root[1] - root[0])
      slope = (gold[after].mean() - gold[before].mean()) / (means[after] - means[before])
      between = (1 - part) * kl[before] + part * kl[after]
      value = (1 - part) * gold[before] + part * gold[after]
      return value - slope * (between - between.mean())
  return None


def _entry(
  objective: str,
  budget: float,
  gold: Interval,
  optimum: Sequence[FrontierPoint],
  start: evaluations_lib.Pool | None,
) -> dict[str, Any]:
  entry: dict[str, Any] = {'objective': objective, 'kl': budget, 'gold_reward': gold.to_dict()}
  if optimum and budget <= optimum[-1].kl:
    best = frontier_lib.frontier_at(optimum, budget)
    entry['optimum'] = best.to_dict()
    gap = best.mean - gold.mean
    low = gap - float(np.hypot(best.mean - best.low, gold.high - gold.mean))
    high = gap + float(np.hypot(best.high - best.mean, gold.mean - gold.low))
    entry['gap'] = Interval(gap, low, high).to_dict()
    base = float(start.values['gold_reward'].mean()) if start else optimum[0].gold_reward.mean
    entry['share'] = (gold.mean - base) / (best.mean - base) if best.mean > base else None
  return entry
