"""What a report warns about: results that cannot be, that fall short, or that went astray."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.reporting import evaluations as evaluations_lib
from experiments.reporting.evaluations import START
from experiments.reporting.text import interval, number, percent, percent_interval, who
from rlhf_jax.evaluation import frontier as frontier_lib
from rlhf_jax.evaluation import statistics
from rlhf_jax.evaluation.frontier import FrontierPoint
from rlhf_jax.evaluation.statistics import Interval

Row = Mapping[str, Any]

# A reward model should come this near to the accuracy that the noise of the labels allows.
BAYES_SHARE = 0.95
# Responses this many times longer or shorter than the start's are worth a look (Singhal et al. 2023
# found much of the gain in reward of open RLHF models to be length).
LENGTH_RATIO = 1.25
# The best step is picked after the fact, so a fall from it must pass a stricter test.
OVEROPTIMISATION_LEVEL = 0.99


def find(
  evaluations: Sequence[Mapping[str, Any]],
  rows: Sequence[Row],
  optimum: Sequence[FrontierPoint],
  reward_model: Mapping[str, Any],
  kl_budget: float | None,
  health: Sequence[Row] = (),
) -> list[str]:
  """All warnings, the impossible first.

  `evaluations` as `evaluations.read` gives them, `rows` of the summary, `kl_budget` in nats a
  sequence (None: no budget), `health` rows of the runs' health.jsonl with 'objective' and 'seed'.
  """
  return [
    *_above_optimum(rows, optimum),
    *_start_off_optimum(rows, optimum),
    *_negative_kl(rows),
    *_weak_reward_model(reward_model),
    *_no_better_than_start(rows),
    *_over_budget(rows, kl_budget),
    *_overoptimised(evaluations),
    *_length_drift(rows),
    *_monitors(health),
  ]


def of_data(quarantined: int, damage: Sequence[str]) -> list[str]:
  """What was not learnt from: files that are damaged, and how many bad records were set aside."""
  found = [f'The data is not whole: {said}.' for said in damage]
  if quarantined:
    many = '1 bad record was' if quarantined == 1 else f'{quarantined} bad records were'
    found.append(
      f'{many} set aside, neither learnt from nor evaluated on: the files in quarantine/ have the '
      'reasons.'
    )
  return found


def last_rows(rows: Sequence[Row], *, pooled: bool) -> list[Row]:
  """The row of the last step of each objective (pooled), or of each of its seeds."""
  last: dict[Any, Row] = {}
  for row in rows:
    key = (row['objective'], row['seed'])
    if (row['seed'] is None) == pooled and (key not in last or row['step'] > last[key]['step']):
      last[key] = row
  return list(last.values())


def _above_optimum(rows: Sequence[Row], optimum: Sequence[FrontierPoint]) -> Iterator[str]:
  if not optimum:
    return
  for row in sorted(rows, key=lambda row: row['seed'] is not None):
    kl, gold = Interval.from_dict(row['kl']), Interval.from_dict(row['gold_reward'])
    if frontier_lib.above_frontier(kl, gold, optimum):
      best = frontier_lib.frontier_at(optimum, kl.high)
      yield (
        f'{who(row)} lies above the optimal frontier: gold {interval(row["gold_reward"])} at KL '
        f'{interval(row["kl"])}, optimum {interval(best.to_dict())} at KL {number(kl.high)}: some '
        'estimate is wrong.'
      )


def _start_off_optimum(rows: Sequence[Row], optimum: Sequence[FrontierPoint]) -> Iterator[str]:
  """The start is the optimum at KL 0: the two are measured apart, and must agree."""
  for row in last_rows(rows, pooled=True):
    if row['objective'] == START and optimum:
      start = optimum[0].gold_reward
      # Above the frontier is said already.
      if Interval.from_dict(row['gold_reward']).high < start.low:
        yield (
          f'{who(row)} has gold {interval(row["gold_reward"])}, yet the optimum starts from '
          f'{interval(start.to_dict())} at KL 0, where the two should be one: they were not '
          'measured on the same model, prompts and sampling settings.'
        )


def _negative_kl(rows: Sequence[Row]) -> Iterator[str]:
  for row in rows:
    if row['kl']['high'] < -1e-6:
      yield (
        f'{who(row)} has a negative KL, {interval(row["kl"])}: the samples and the two log-probs '
        'compared do not belong together.'
      )


def _weak_reward_model(reward_model: Mapping[str, Any]) -> Iterator[str]:
  accuracy, bayes = reward_model['accuracy'], reward_model['bayes_accuracy']
  if accuracy is not None and bayes is not None and accuracy < BAYES_SHARE * bayes:
    yield (
      f'The reward model is right on {percent(accuracy)} of held-out comparisons, under '
      f'{BAYES_SHARE:.0%} of the {percent(bayes)} that the noise of the labels allows: train it on '
      'more comparisons, or longer.'
    )


def _no_better_than_start(rows: Sequence[Row]) -> Iterator[str]:
  pooled = {row['objective']: row for row in last_rows(rows, pooled=True)}
  if START not in pooled:
    return
  start = Interval.from_dict(pooled[START]['gold_reward'])
  for objective, row in pooled.items():
    if objective == START or row['gold_reward']['low'] > start.high:
      continue
    better = [
      other
      for other in rows
      if other['objective'] == objective
      and other['seed'] is None
      and other['gold_reward']['low'] > start.high
    ]
    best = max(better, key=lambda other: other['gold_reward']['mean']) if better else None
    yield (
      f'{who(row)} does not beat {START}: gold {interval(row["gold_reward"])} against '
      f'{interval(start.to_dict())}.'
      + (f' At step {best["step"]} it did: {interval(best["gold_reward"])}.' if best else '')
    )


def _over_budget(rows: Sequence[Row], budget: float | None) -> Iterator[str]:
  if budget is None:
    return
  said = {START}  # where all seeds together are over, each is not said again
  for row in [*last_rows(rows, pooled=True), *last_rows(rows, pooled=False)]:
    if row['objective'] not in said and row['kl']['low'] > budget:
      if row['seed'] is None:
        said.add(row['objective'])
      yield (
        f'{who(row)} spent KL {interval(row["kl"])} nats a sequence, over the budget of '
        f'{number(budget)}.'
      )


def _overoptimised(evaluations: Sequence[Mapping[str, Any]]) -> Iterator[str]:
  """Proxy up, gold down since the best step (Gao et al. 2023), paired by seed and prompt."""
  for objective in evaluations_lib.objectives(evaluations):
    pools = evaluations_lib.pools(evaluations, objective)
    if objective == START or len(pools) < 2:
      continue
    best = max(pools, key=lambda pool: float(pool.values['gold_reward'].mean()))
    change = {
      metric: statistics.pooled_interval(
        pools[-1].values[metric] - best.values[metric], OVEROPTIMISATION_LEVEL
      )
      for metric in ('gold_reward', 'proxy_reward')
    }
    if change['gold_reward'].high < 0 < change['proxy_reward'].low:
      yield (
        f'{objective} over-optimised the proxy: from step {best.step} to {pools[-1].step} the '
        f'proxy reward rose by {number(change["proxy_reward"].mean)} while the gold reward fell by '
        f'{number(-change["gold_reward"].mean)} '
        f'({OVEROPTIMISATION_LEVEL:.0%} interval {number(-change["gold_reward"].high)} to '
        f'{number(-change["gold_reward"].low)}): stop earlier, or hold KL tighter.'
      )


def _length_drift(rows: Sequence[Row]) -> Iterator[str]:
  pooled = {row['objective']: row for row in last_rows(rows, pooled=True)}
  if START not in pooled:
    return
  start = pooled[START]['length']
  for objective, row in pooled.items():
    length = row['length']
    apart = not Interval.from_dict(length).overlaps(Interval.from_dict(start))
    longer = length['mean'] > LENGTH_RATIO * start['mean']
    shorter = length['mean'] < start['mean'] / LENGTH_RATIO
    if objective != START and apart and (longer or shorter):
      yield (
        f'{who(row)} writes {"longer" if longer else "shorter"} responses than {START}: '
        f'{interval(length, 1)} tokens against {interval(start, 1)}, '
        f'win rate {percent_interval(row["win_rate"])}: see that length is not what is rewarded.'
      )


def _monitors(health: Sequence[Row]) -> Iterator[str]:
  """What runs said of themselves while they trained; each monitor once an objective."""
  found: dict[tuple[str, str], list[Row]] = {}
  for event in health:
    found.setdefault((event['objective'], event['monitor']), []).append(event)
  for (objective, monitor), events in found.items():
    first = min(events, key=lambda event: (event['step'], event['seed']))
    seeds = sorted({event['seed'] for event in events})
    which = f'seed{"s" if len(seeds) > 1 else ""} {", ".join(map(str, seeds))}'
    again = f'; {len(events)} such events in all' if len(events) > 1 else ''
    yield (
      f'{objective} ({which}) was warned of by its monitor {monitor}, first at step '
      f'{first["step"]} of seed {first["seed"]}: {first["text"]}{again} (docs/health.md).'
    )
