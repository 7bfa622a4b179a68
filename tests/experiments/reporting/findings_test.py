"""Each warning is given when it should be, and not when it should not."""

import pytest

from experiments.reporting.summary import Study, summarise

GOOD = {'accuracy': 0.8, 'bayes_accuracy': 0.82}


def findings(rows, optimum=(), reward_model=GOOD, budget=None, health=()):
  study = Study(title='t', command='c', kl_budget=budget)
  summary = summarise(rows, optimum=optimum, reward_model=reward_model, study=study, health=health)
  return summary['findings']


@pytest.fixture
def fair(evaluation):
  """A start, and an objective that gains reward with nothing to warn about."""
  rows = [evaluation('sft', 0, 10, gold=2.0)]
  for seed in (0, 1):
    for step in (10, 20):
      rows.append(evaluation('dpo', seed, step, gold=2.0 + step / 20, kl=0.02 * step))
  return rows


def test_a_good_study_has_no_warnings(fair, optimum):
  assert findings(fair, optimum, budget=1.0) == []


def test_a_point_above_the_optimum_is_said_with_all_its_numbers(fair, evaluation, optimum):
  fair.append(evaluation('ppo', 1, 40, gold=3.8, kl=0.1))
  pooled, seed = findings(fair, optimum)
  assert pooled.startswith('ppo (all seeds, step 40) lies above the optimal frontier: gold 3.80 [')
  assert seed.startswith('ppo (seed 1, step 40) lies above the optimal frontier: gold 3.80 [')
  assert 'at KL 0.10 [' in seed and ', optimum 2.9' in seed and 'some estimate is wrong' in seed


def test_a_start_below_the_beginning_of_the_optimum_is_said(evaluation, optimum):
  (finding,) = findings([evaluation('sft', 0, 10, gold=1.0)], optimum)
  assert finding.startswith('sft (all seeds, step 10) has gold 1.00') and 'should be one' in finding


def test_a_negative_kl_is_said(fair, evaluation):
  fair.append(evaluation('ppo', 0, 10, gold=3.0, kl=-0.5))
  assert all('ppo' in said and 'negative KL' in said for said in findings(fair))
  assert len(findings(fair)) == 2


@pytest.mark.parametrize(('accuracy', 'warned'), [(0.76, False), (0.75, True)])
def test_a_reward_model_under_95_percent_of_bayes_is_said(fair, accuracy, warned):
  said = findings(fair, reward_model={'accuracy': accuracy, 'bayes_accuracy': 0.8})
  assert bool(said) == warned
  if warned:
    assert '75.0%' in said[0] and 'under 95% of the 80.0%' in said[0]


def test_what_was_set_aside_of_the_data_is_said(fair):
  study = Study(title='t', command='c', quarantined=3, damage=('a.gz:7: not a whole gzip file',))
  made = summarise(fair, optimum=(), reward_model=GOOD, study=study)
  damage, bad = made['findings']
  assert damage == 'The data is not whole: a.gz:7: not a whole gzip file.'
  assert bad.startswith('3 bad records were set aside') and 'quarantine/' in bad
  assert (made['study']['quarantined'], made['study']['damage']) == (3, [study.damage[0]])


def test_an_unknown_label_noise_gives_no_warning(fair):
  assert findings(fair, reward_model={'accuracy': 0.51, 'bayes_accuracy': None}) == []


def test_an_objective_that_does_not_beat_the_start_is_said(fair, evaluation):
  fair.append(evaluation('cpl', 0, 20, gold=2.05))
  (finding,) = findings(fair)
  assert finding.startswith('cpl (all seeds, step 20) does not beat sft: gold 2.05 [')
  assert 'At step' not in finding


def test_an_objective_that_beat_the_start_on_the_way_is_said_so(fair, evaluation):
  fair.append(evaluation('cpl', 0, 10, gold=4.0))
  fair.append(evaluation('cpl', 0, 20, gold=2.0))
  (finding,) = findings(fair)
  assert 'does not beat sft' in finding and 'At step 10 it did: 4.00 [' in finding


def test_a_kl_over_budget_is_said_once_for_all_seeds(fair):
  (finding,) = findings(fair, budget=0.3)
  assert finding.startswith('dpo (all seeds, step 20) spent KL 0.40')
  assert 'over the budget of 0.30' in finding


def test_a_single_seed_over_budget_is_said(fair, evaluation):
  for seed, kl in ((0, 0.2), (1, 0.2), (2, 1.5)):
    fair.append(evaluation('ppo', seed, 20, gold=3.0, kl=kl))
  (finding,) = findings(fair, budget=1.0)
  assert finding.startswith('ppo (seed 2, step 20) spent KL 1.50')


@pytest.mark.parametrize(('proxy', 'warned'), [(2.0, True), (-2.0, False)])
def test_proxy_up_while_gold_falls_is_over_optimisation(fair, evaluation, proxy, warned):
  """If the proxy falls as well, the run broke down for another reason."""
  for seed in (0, 1):
    fair.append(evaluation('ppo', seed, 10, gold=4.0))
    fair.append(evaluation('ppo', seed, 20, gold=3.0, proxy=proxy))
  said = findings(fair)
  assert bool(said) == warned
  if warned:
    assert 'ppo over-optimised the proxy: from step 10 to 20' in said[0]
    assert 'rose by 2.00 while the gold reward fell by 1.00' in said[0]


@pytest.mark.parametrize(
  ('length', 'spread', 'said'),
  [(14.0, 0, 'longer'), (7.0, 0, 'shorter'), (11.5, 0, None), (14.0, 60, None)],
)
def test_a_drift_of_length_is_said_beyond_a_quarter_and_the_intervals(
  fair, evaluation, length, spread, said
):
  row = evaluation('ppo', 0, 20, gold=3.0, length=length)
  row['length'] = length + spread * (row['length'] - length)
  found = findings([*fair, row])
  assert len(found) == (said is not None)
  if said is not None:
    assert f'ppo (all seeds, step 20) writes {said} responses than sft: {length:.1f} [' in found[0]


def test_what_monitors_said_is_said_once_for_each_of_them(fair):
  def event(seed, step, monitor, text):
    return {'objective': 'dpo', 'seed': seed, 'step': step, 'monitor': monitor, 'text': text}

  health = [
    event(0, 9, 'length', 'responses have 40 tokens, 10 at first'),
    event(1, 4, 'length', 'responses have 31 tokens, 10 at first'),
    event(1, 7, 'skipped_updates', '1 updates skipped (1 so far): loss nan'),
  ]
  length, skipped = findings(fair, health=health)
  assert length == (
    'dpo (seeds 0, 1) was warned of by its monitor length, first at step 4 of seed 1: responses '
    'have 31 tokens, 10 at first; 2 such events in all (docs/health.md).'
  )
  assert skipped.startswith('dpo (seed 1) was warned of by its monitor skipped_updates')
