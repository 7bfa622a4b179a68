"""What a study measured: one evaluation for each objective, seed and step, prompt by prompt."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np

from rlhf_jax.common.errors import DataError
from rlhf_jax.evaluation import statistics

METRICS = ('gold_reward', 'proxy_reward', 'kl', 'win', 'length')
OPTIONAL = ('reward',)  # of objectives that are paid something else than gold or proxy reward
START = 'sft'  # the objective whose last step every other objective starts from


class Evaluation(TypedDict):
  """One model on the held-out prompts, the same prompts in the same order in every evaluation.

  The arrays are `[P]`, or `[P, K]` with K completions a prompt: gold and proxy reward of the
  completions, KL to the start in nats a sequence, win against the start's completion (1, 1/2 for a
  tie, 0), and length in tokens; `reward`, what the objective pays, where that is neither gold nor
  proxy reward. `tokens` and `seconds` are what training to this step took.
  """

  objective: str
  seed: int
  step: int
  tokens: int
  seconds: float
  gold_reward: np.ndarray
  proxy_reward: np.ndarray
  kl: np.ndarray
  win: np.ndarray
  length: np.ndarray
  reward: NotRequired[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Pool:
  """One objective at one step, over its seeds: the values are `[S, P]`, one a prompt."""

  objective: str
  step: int
  tokens: float
  seconds: float
  values: Mapping[str, np.ndarray]


def measured(arrays: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
  """The metrics of these names among a run's arrays; of `OPTIONAL` those that are there."""
  return {name: arrays[name] for name in names if name in arrays or name not in OPTIONAL}


def read(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Checks evaluations and averages their completions: arrays come out `[P]`, sorted by step.

  Raises DataError naming objective, seed, step and field for a missing field, another number of
  prompts, values that are not finite, a win outside [0, 1], or an evaluation given twice.
  """
  if not evaluations:
    raise DataError('evaluations: expected at least one; nothing was evaluated.')
  checked: list[dict[str, Any]] = []
  seen: set[tuple[Any, ...]] = set()
  prompts: int | None = None
  for given in evaluations:
    missing = Evaluation.__required_keys__ - set(given)
    if missing:
      named = ', '.join(name for name in Evaluation.__annotations__ if name in missing)
      raise DataError(f'evaluation {_name(given)}: expected the fields {named}.')
    key = (given['objective'], given['seed'], given['step'])
    if key in seen:
      raise DataError(f'evaluation {_name(given)}: given twice.')
    seen.add(key)
    row = dict(given)
    for metric in metrics_of([given]):
      try:
        row[metric] = statistics.per_prompt(given[metric])
      except ValueError as error:
        raise DataError(f'evaluation {_name(given)}: {metric}: {error}') from error
      prompts = row[metric].size if prompts is None else prompts
      if row[metric].size != prompts:
        raise DataError(
          f'evaluation {_name(given)}: {metric} has {row[metric].size} prompts, others {prompts}: '
          'every evaluation must be on the same prompts in the same order.'
        )
    if not ((row['win'] >= 0) & (row['win'] <= 1)).all():
      raise DataError(f'evaluation {_name(given)}: win: expected values between 0 and 1.')
    checked.append(row)
  return sorted(checked, key=lambda row: (row['step'], row['seed']))


def objectives(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
  """The names of the objectives, the start first, then as they were given."""
  names = dict.fromkeys(str(row['objective']) for row in evaluations)
  return sorted(names, key=lambda name: name != START)


def pools(evaluations: Sequence[Mapping[str, Any]], objective: str) -> list[Pool]:
  """One objective's evaluations pooled over seeds, at every step that all its seeds have."""
  rows = [row for row in evaluations if row['objective'] == objective]
  seeds = {row['seed'] for row in rows}
  pooled = []
  for step in sorted({row['step'] for row in rows}):
    there = [row for row in rows if row['step'] == step]
    if len(there) == len(seeds):
      pooled.append(
        Pool(
          objective,
          step,
          float(np.mean([row['tokens'] for row in there])),
          float(np.mean([row['seconds'] for row in there])),
          {metric: np.stack([row[metric] for row in there]) for metric in metrics_of(there)},
        )
      )
  return pooled


def metrics_of(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
  """The metrics that all of these have."""
  return [*METRICS, *(name for name in OPTIONAL if all(name in row for row in evaluations))]


def _name(given: Mapping[str, Any]) -> str:
  return ', '.join(
    f'{name} {given.get(name, "(missing)")}' for name in ('objective', 'seed', 'step')
  )
