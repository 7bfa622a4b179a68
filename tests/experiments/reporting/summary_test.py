"""The summary: one row an evaluation, pooled rows, plain JSON."""

import json

import numpy as np
import pytest

from experiments.reporting.summary import summarise
from rlhf_jax.evaluation import statistics


def test_there_is_a_row_for_each_evaluation_and_each_pooled_step(summary, evaluations):
  keys = {(row['objective'], row['seed'], row['step']) for row in summary['rows']}
  given = {(row['objective'], row['seed'], row['step']) for row in evaluations}
  pooled = {('sft', None, 10), *((n, None, s) for n in ('ppo', 'dpo') for s in (10, 20))}
  assert keys == given | pooled


def test_rows_hold_the_statistics_of_what_was_measured(summary, evaluations):
  seeds = [row for row in evaluations if row['objective'] == 'ppo' and row['step'] == 20]
  (pooled,) = (
    row
    for row in summary['rows']
    if (row['objective'], row['seed'], row['step']) == ('ppo', None, 20)
  )
  gold = np.stack([row['gold_reward'] for row in seeds])
  wins = np.stack([row['win'] for row in seeds])
  assert pooled['gold_reward'] == statistics.pooled_interval(gold).to_dict()
  assert pooled['win_rate'] == statistics.proportion_interval(wins).to_dict()
  assert pooled['win_rate']['mean'] == pytest.approx(0.7)
  assert pooled['tokens'] == 20000 and pooled['seconds'] == 10.0


def test_the_summary_is_plain_json(summary, evaluations, optimum, study):
  made = summarise(
    evaluations,
    optimum=optimum,
    reward_model={'accuracy': np.float32(0.5), 'bayes_accuracy': np.float64(0.75)},
    study=study,
  )
  assert json.loads(json.dumps(made, allow_nan=False)) == made
  assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_the_summary_does_not_depend_on_the_order_of_evaluations(
  summary, evaluations, optimum, study
):
  again = summarise(
    [evaluations[0], *evaluations[1:5][::-1], *evaluations[5:][::-1]],
    optimum=optimum,
    reward_model=summary['reward_model'],
    study=study,
  )
  for name in ('rows', 'findings', 'matched_kl'):
    assert again[name] == summary[name]


def test_a_study_without_optimum_or_start_is_summarised(evaluation, study):
  made = summarise(
    [evaluation('dpo', 0, 5, kl=1.0)],
    optimum=[],
    reward_model={'accuracy': None, 'bayes_accuracy': None},
    study=study,
  )
  assert made['optimum'] == [] and made['findings'] == []


def test_what_an_objective_is_paid_is_in_its_rows_alone(evaluations, optimum, study):
  rows = [
    {**row, 'reward': 2 * row['length']} if row['objective'] == 'ppo' else row
    for row in evaluations
  ]
  made = summarise(
    rows, optimum=optimum, reward_model={'accuracy': 0.5, 'bayes_accuracy': 0.75}, study=study
  )
  for row in made['rows']:
    assert ('reward' in row) == (row['objective'] == 'ppo')
    if 'reward' in row:
      assert row['reward']['mean'] == pytest.approx(2 * row['length']['mean'])
