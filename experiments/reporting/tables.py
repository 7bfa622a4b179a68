"""The tables and texts that both forms of a report show."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reporting import text
from experiments.reporting.charts import compared, rows_of, seeds_of
from experiments.reporting.evaluations import START
from rlhf_jax.evaluation import frontier as frontier_lib
from rlhf_jax.evaluation.frontier import FrontierPoint


@dataclasses.dataclass(frozen=True)
class Table:
  """Plain text cells; the first column is a name, the others are numbers."""

  header: Sequence[str]
  rows: Sequence[Sequence[str]]


def final_table(summary: Mapping[str, Any], *, pooled: bool) -> Table:
  """The last step of each objective, over all its seeds or one row a seed."""
  optimum = [FrontierPoint.from_dict(point) for point in summary['optimum']]
  paid = any('reward' in row for row in summary['rows'])
  header = [
    'Objective',
    'Seeds' if pooled else 'Seed',
    'Step',
    'Gold reward',
    *(['Optimum at its KL'] if optimum else []),
    'KL (nats)',
    'Proxy reward',
    *(['Reward paid'] if paid else []),
    f'Win rate against {START}',
    'Length (tokens)',
    'Tokens seen',
    'Wall time',
  ]
  rows = []
  for objective in [START, *compared(summary)]:
    seeds = seeds_of(summary, objective)
    for seed in [None] if pooled else seeds:
      found = rows_of(summary, objective, seed)
      if found:
        shown = str(len(seeds)) if seed is None else str(seed)
        rows.append(_final_row(found[-1], shown, optimum, paid))
  return Table(header, rows)


def matched_table(summary: Mapping[str, Any]) -> Table | None:
  """Gold reward at equal KL, by budget; None where no objective reached one."""
  entries = sorted(summary.get('matched_kl', ()), key=lambda entry: entry['kl'])
  if not entries:
    return None
  rows = []
  last = None
  for entry in entries:
    share = entry.get('share')
    rows.append(
      [
        text.number(entry['kl']) if entry['kl'] != last else '',
        entry['objective'],
        text.interval(entry['gold_reward']),
        text.interval(entry['optimum']) if 'optimum' in entry else '–',
        text.interval(entry['gap']) if 'gap' in entry else '–',
        f'{100 * share:.0f}%' if share is not None else '–',
      ]
    )
    last = entry['kl']
  header = ['KL (nats)', 'Objective', 'Gold reward', 'Optimum', 'Gap', 'Share of possible gain']
  return Table(header, rows)


def reward_model_text(summary: Mapping[str, Any]) -> str:
  """One or two sentences on the reward model."""
  model = summary['reward_model']
  accuracy, bayes = model['accuracy'], model['bayes_accuracy']
  if accuracy is None:
    return 'No reward model was evaluated.'
  interval = model.get('accuracy_interval')
  shown = text.percent_interval(interval) if interval else text.percent(accuracy)
  said = f'It orders {shown} of held-out comparisons as their labels do (ties count half).'
  if bayes is None:
    return said
  return (
    f'{said} Knowing the true reward, one would be right on {text.percent(bayes)}, as the labels '
    f'are noisy: it reaches {text.percent(accuracy / bayes)} of what can be reached.'
  )


def method(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
  """How the numbers were made, as (name, text)."""
  facts = [(name, said) for name, said in summary.get('study', {}).get('matched', ())]
  prompts = summary.get('prompts')
  held = f'the same {prompts} held-out prompts' if prompts else 'the same held-out prompts'
  facts.append(
    (
      'Intervals',
      f'Every evaluation is on {held}. Brackets are 95% intervals with prompts as the unit: '
      "Student's t over prompts for one seed; over seeds and prompts as crossed random effects "
      "(Satterthwaite's degrees of freedom) for all seeds; Wilson's score at the effective number "
      'of prompts for win rates, ties counting half. They hold for new prompts of the same kind '
      'and, where there are several seeds, for new seeds of training.',
    )
  )
  single = [name for name in compared(summary) if len(seeds_of(summary, name)) == 1]
  if single:
    facts.append(
      (
        'One seed',
        f'{", ".join(single)} ran with one seed: the intervals say nothing of how training varies.',
      )
    )
  if summary['optimum']:
    facts.append(('Optimum', _optimum_text(summary)))
  if summary.get('matched_kl'):
    facts.append(
      (
        'Matched KL',
        'Each seed is read where its mean KL first reaches the budget, between two evaluations '
        'linearly in the square root of KL; only objectives all of whose seeds reach a budget are '
        'listed. The share is the gain in gold reward over the start, as a part of that of the '
        'optimum.',
      )
    )
  return facts


def _optimum_text(summary: Mapping[str, Any]) -> str:
  first, last = summary['optimum'][0], summary['optimum'][-1]
  ends = f'It ends at KL {text.number(last["kl"])}'
  if 'effective_samples' in last:
    ends += (
      f', where the {first["effective_samples"]:.0f} samples of a prompt count as '
      f'{last["effective_samples"]:.0f} (harmonic mean)'
    )
  return (
    'The best gold reward that any policy can have at a KL, that of pi* proportional to '
    'pi_start exp(gold / beta), estimated by weighing samples of the start; its band is a '
    f'bootstrap over prompts. {ends}; past that the dotted line is an upper bound. A response too '
    'rare to be among the samples is not counted: near its end the curve is a little low rather '
    'than high.'
  )


def _final_row(
  row: Mapping[str, Any], seed: str, optimum: Sequence[FrontierPoint], paid: bool
) -> list[str]:
  cells = [row['objective'], seed, str(row['step']), text.interval(row['gold_reward'])]
  if optimum:
    best = frontier_lib.frontier_at(optimum, row['kl']['mean'])
    known = row['kl']['mean'] <= optimum[-1].kl
    cells.append(text.interval(best.to_dict()) if known else f'at most {text.number(best.high)}')
  return [
    *cells,
    text.interval(row['kl']),
    text.interval(row['proxy_reward']),
    *([text.interval(row['reward']) if 'reward' in row else '–'] if paid else []),
    text.percent_interval(row['win_rate']),
    text.interval(row['length'], 1),
    text.count(row['tokens']),
    text.seconds(row['seconds']),
  ]
