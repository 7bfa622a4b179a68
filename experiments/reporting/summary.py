"""Evaluations of a study to its summary.json, from which alone its reports are made."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.reporting import evaluations as evaluations_lib
from experiments.reporting import findings as findings_lib
from experiments.reporting import matched, schema
from rlhf_jax.evaluation import statistics
from rlhf_jax.evaluation.frontier import FrontierPoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
  """What a reader must know of a study beside its numbers; all of it is shown as text.

  Attributes:
    title: heads the report.
    command: makes the study, and this report, again.
    matched: what was held equal, as (name, text): the start, the preferences, the sampling.
    environment: versions and machine, as (name, text).
    kl_budget: nats a sequence that a policy should stay under, or None.
    quarantined: how many bad records of the data were set aside.
    damage: what is said of data files that are damaged from some line on.
  """

  title: str
  command: str
  matched: Sequence[tuple[str, str]] = ()
  environment: Sequence[tuple[str, str]] = ()
  kl_budget: float | None = None
  quarantined: int = 0
  damage: Sequence[str] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """A sample shown in the report: what one objective wrote after a prompt."""

  prompt: str
  objective: str
  response: str
  gold_reward: float


def summarise(
  evaluations: Sequence[Mapping[str, Any]],
  *,
  optimum: Sequence[FrontierPoint],
  reward_model: Mapping[str, Any],
  study: Study,
  completions: Sequence[Completion] = (),
  kl_budgets: Sequence[float] | None = None,
  health: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
  """The summary of a study: schema 1 of `schema.validate_summary`, plain JSON values.

  `evaluations` are mappings with the fields of `evaluations.Evaluation`, one for each objective,
  seed and step; `optimum` comes from `frontier.optimal_frontier` (empty where it is unknown);
  `reward_model` has `accuracy` and `bayes_accuracy`, and `accuracy_interval` if known;
  `kl_budgets` are the KLs at which objectives are matched (None: round numbers within reach);
  `health` is what the runs' monitors said, as `findings.find` takes it.
  Beyond the schema the summary holds `matched_kl`, `prompts` (how many), `study` and `completions`,
  so that a report is a function of it.

  Pooled rows (seed null) are there for the steps at which all seeds of an objective were evaluated.
  Raises DataError for evaluations that do not fit together.
  """
  checked = evaluations_lib.read(evaluations)
  rows: list[dict[str, Any]] = []
  for objective in evaluations_lib.objectives(checked):
    for row in (row for row in checked if row['objective'] == objective):
      values = {metric: row[metric][None] for metric in evaluations_lib.metrics_of([row])}
      rows.append(_row(objective, int(row['seed']), row, values))
    for pool in evaluations_lib.pools(checked, objective):
      counts = {'step': pool.step, 'tokens': pool.tokens, 'seconds': pool.seconds}
      rows.append(_row(objective, None, counts, pool.values))
  summary: dict[str, Any] = {
    'schema': schema.VERSION,
    'rows': rows,
    'optimum': [point.to_dict() for point in optimum],
    'reward_model': _plain(reward_model),
    'findings': [
      *findings_lib.find(checked, rows, optimum, reward_model, study.kl_budget, health),
      *findings_lib.of_data(study.quarantined, study.damage),
    ],
    'matched_kl': matched.matched_kl(checked, optimum, kl_budgets),
    'prompts': int(checked[0]['kl'].size),
    'study': _plain(dataclasses.asdict(study)),
    'completions': [_plain(dataclasses.asdict(sample)) for sample in completions],
  }
  schema.validate_summary(summary)
  return summary


def _row(
  objective: str,
  seed: int | None,
  counts: Mapping[str, Any],
  values: Mapping[str, np.ndarray],
) -> dict[str, Any]:
  """A row of the summary from `[S, P]` values."""
  row: dict[str, Any] = {'objective': objective, 'seed': seed, 'step': int(counts['step'])}
  for metric in values:
    if metric == 'win':
      row['win_rate'] = statistics.proportion_interval(values[metric]).to_dict()
    else:
      row[metric] = statistics.pooled_interval(values[metric]).to_dict()
  row['tokens'] = float(counts['tokens']) if seed is None else int(counts['tokens'])
  row['seconds'] = float(counts['seconds'])
  return row


def _plain(value: Any) -> Any:
  """Lists for tuples and Python's numbers for NumPy's: what is read back equals what is written."""
  if isinstance(value, np.generic):
    return value.item()
  if isinstance(value, Mapping):
    return {name: _plain(item) for name, item in value.items()}
  if isinstance(value, (tuple, list)):
    return [_plain(item) for item in value]
  return value
