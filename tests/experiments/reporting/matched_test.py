"""Gold reward at equal KL, on curves whose value there is known."""

import numpy as np
import pytest

from experiments.reporting import evaluations as evaluations_lib
from experiments.reporting.matched import matched_kl


def entries(rows, optimum=(), budgets=None):
  return matched_kl(evaluations_lib.read(rows), optimum, budgets)


def test_the_reward_is_read_where_the_run_first_reaches_the_budget(evaluation):
  """Gold is 2 sqrt(KL) until KL 4, and falls later: at KL 1 it is 2, whatever comes after."""
  rows = [evaluation('sft', 0, 1, gold=0.0)]
  for step, kl, gold in ((1, 0.25, 1.0), (2, 4.0, 4.0), (3, 0.5, -3.0), (4, 9.0, -5.0)):
    rows.append(evaluation('dpo', 0, step, gold=gold, kl=kl))
  found = {
    entry['kl']: entry['gold_reward']['mean'] for entry in entries(rows, (), [0.1, 1.0, 4.0])
  }
  assert found == pytest.approx({0.1: 2 * np.sqrt(0.1), 1.0: 2.0, 4.0: 4.0})


def test_only_budgets_that_all_seeds_reach_are_there(evaluation):
  rows = [evaluation('sft', 0, 1)]
  rows += [evaluation('dpo', 0, 5, kl=3.0), evaluation('dpo', 1, 5, kl=0.7)]
  rows += [evaluation('ppo', 0, 5, kl=1.5)]
  reached = [(entry['objective'], entry['kl']) for entry in entries(rows)]
  assert reached == [
    *(('dpo', kl) for kl in (0.1, 0.25, 0.5)),
    *(('ppo', kl) for kl in (0.1, 0.25, 0.5, 1.0)),
  ]


def test_a_curve_starts_at_the_start_unless_step_0_was_evaluated(evaluation):
  rows = [evaluation('sft', 0, 9, gold=1.0), evaluation('dpo', 0, 5, gold=2.0, kl=1.0)]
  quarter = entries(rows, (), [0.25])[0]['gold_reward']['mean']
  assert quarter == pytest.approx(1.5)
  rows.append(evaluation('dpo', 0, 0, gold=0.0, kl=0.0))
  quarter = entries(rows, (), [0.25])[0]['gold_reward']['mean']
  assert quarter == pytest.approx(1.0)


def test_the_interval_holds_the_noise_of_the_kl(evaluation):
  """Rewards that follow each prompt's own KL exactly have no spread left at a fixed KL."""
  before, after = evaluation('dpo', 0, 1, kl=1.0), evaluation('dpo', 0, 2, kl=2.0)
  for row in (before, after):
    row['gold_reward'] = 3.0 * row['kl']
  gold = entries([before, after], (), [2.0])[0]['gold_reward']
  assert gold['mean'] == pytest.approx(6.0)
  assert gold['high'] - gold['low'] < 1e-6
  still = dict(after, kl=np.full(60, 2.0))
  gold = entries([before, still], (), [2.0])[0]['gold_reward']
  assert gold['high'] - gold['low'] > 0.1


def test_gap_and_share_against_the_optimum(evaluation, optimum):
  """The optimum rises from about 2; half of its gain is a share of one half."""
  best = next(point for point in optimum if point.kl > 0.2)
  base = 2.0
  gold = (best.gold_reward.mean + base) / 2
  rows = [evaluation('sft', 0, 1, gold=base), evaluation('dpo', 0, 2, gold=gold, kl=best.kl)]
  entry = entries(rows, optimum, [best.kl])[0]
  assert entry['share'] == pytest.approx(0.5)
  assert entry['gap']['mean'] == pytest.approx(best.gold_reward.mean - gold)
  assert entry['gap']['low'] < entry['gap']['mean'] < entry['gap']['high']


def test_there_is_no_gap_where_the_optimum_is_unknown(evaluation, optimum):
  rows = [evaluation('sft', 0, 1), evaluation('dpo', 0, 2, kl=9.0)]
  entry = entries(rows, optimum, [8.0])[0]
  assert 'gap' not in entry and 'optimum' not in entry
