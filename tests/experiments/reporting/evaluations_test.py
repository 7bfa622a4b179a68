"""Evaluations are checked where they enter, and pooled only over complete sets of seeds."""

import numpy as np
import pytest

from experiments.reporting import evaluations as evaluations_lib
from rlhf_jax.common.errors import DataError


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'kl': np.zeros(59)}, 'kl has 59 prompts'),
    ({'gold_reward': np.full(60, np.nan)}, 'seed 1, step 5: gold_reward: 60 of 60 .* not finite'),
    ({'win': np.full(60, 2.0)}, 'win: expected values between 0 and 1'),
    ({'seed': 0}, 'given twice'),
  ],
)
def test_evaluations_that_do_not_fit_are_refused(evaluation, change, message):
  rows = [evaluation('dpo', 0, 5), {**evaluation('dpo', 1, 5), **change}]
  with pytest.raises(DataError, match=message):
    evaluations_lib.read(rows)


def test_a_missing_field_is_named(evaluation):
  row = evaluation('dpo', 0, 5)
  del row['win'], row['tokens']
  with pytest.raises(DataError, match='objective dpo, seed 0, step 5.*tokens, win'):
    evaluations_lib.read([row])


def test_nothing_evaluated_is_refused():
  with pytest.raises(DataError, match='at least one'):
    evaluations_lib.read([])


def test_completions_are_averaged_for_each_prompt(evaluation):
  row = evaluation('dpo', 0, 5)
  twice = np.stack([row['gold_reward'] - 1, row['gold_reward'] + 1], 1)
  read = evaluations_lib.read([{**row, 'gold_reward': twice}])[0]
  np.testing.assert_allclose(read['gold_reward'], row['gold_reward'])


def test_the_start_comes_first_and_the_rest_in_their_order(evaluation):
  rows = [evaluation(name, 0, 1) for name in ('ppo', 'cpl', 'sft', 'dpo')]
  assert evaluations_lib.objectives(rows) == ['sft', 'ppo', 'cpl', 'dpo']


def test_only_steps_that_all_seeds_have_are_pooled(evaluation):
  """A curve whose points average different seeds would jump where a seed is missing."""
  rows = [evaluation('dpo', seed, step) for seed, step in ((0, 5), (1, 5), (0, 10))]
  pooled = evaluations_lib.pools(evaluations_lib.read(rows), 'dpo')
  assert [pool.step for pool in pooled] == [5]
  assert pooled[0].values['kl'].shape == (2, 60)


def test_what_an_objective_is_paid_goes_along_where_it_is_known(evaluation):
  """Checked and pooled like the others; whoever has none is not asked for it."""
  paid, other = evaluation('rloo', 0, 5), evaluation('dpo', 0, 5)
  paid['reward'] = paid['kl'] + 3.0
  pools = {
    name: evaluations_lib.pools(evaluations_lib.read([paid, other]), name)[0].values
    for name in ('rloo', 'dpo')
  }
  np.testing.assert_allclose(pools['rloo']['reward'], paid['reward'][None])
  assert set(pools['dpo']) == set(evaluations_lib.METRICS)
  with pytest.raises(DataError, match='rloo, seed 0, step 5: reward: .* not finite'):
    evaluations_lib.read([{**paid, 'reward': np.full(60, np.inf)}])


def test_only_what_may_be_missing_may_be_missing(evaluation):
  row = evaluation('dpo', 0, 5)
  names = (*evaluations_lib.METRICS, *evaluations_lib.OPTIONAL)
  assert list(evaluations_lib.measured(row, names)) == list(evaluations_lib.METRICS)
  assert 'reward' in evaluations_lib.measured({**row, 'reward': row['kl']}, names)
  del row['kl']
  with pytest.raises(KeyError, match='kl'):
    evaluations_lib.measured(row, names)
