"""The tables and texts that both forms of a report show."""

import copy

from experiments.reporting import tables


def test_the_final_table_has_the_last_step_and_the_optimum_there(summary):
  table = tables.final_table(summary, pooled=True)
  assert [row[:3] for row in table.rows] == [
    ['sft', '1', '10'],
    ['ppo', '2', '20'],
    ['dpo', '2', '20'],
  ]
  assert all(len(row) == len(table.header) for row in table.rows)
  optimum = table.header.index('Optimum at its KL')
  assert table.rows[1][optimum].startswith('3.2')  # of rewards 0 and 4, about 3.24 at KL 0.21


def test_each_seed_has_its_row(summary):
  table = tables.final_table(summary, pooled=False)
  assert [row[:2] for row in table.rows] == [
    ['sft', '0'],
    *([name, seed] for name in ('ppo', 'dpo') for seed in '01'),
  ]


def test_past_its_end_the_optimum_is_a_bound(summary):
  short = copy.deepcopy(summary)
  short['optimum'] = short['optimum'][:3]
  table = tables.final_table(short, pooled=True)
  assert table.rows[1][table.header.index('Optimum at its KL')].startswith('at most ')


def test_a_budget_is_named_once(summary):
  table = tables.matched_table(summary)
  assert table is not None
  assert [row[:2] for row in table.rows] == [['0.10', 'ppo'], ['', 'dpo']]
  assert tables.matched_table({**summary, 'matched_kl': []}) is None


def test_the_reward_model_is_put_beside_what_can_be_reached(summary):
  assert '80.0% of held-out' in tables.reward_model_text(summary)
  assert '97.6% of what can be reached' in tables.reward_model_text(summary)
  interval = {'mean': 0.8, 'low': 0.75, 'high': 0.85}
  model = {'accuracy': 0.8, 'bayes_accuracy': None, 'accuracy_interval': interval}
  assert '80.0% [75.0, 85.0]' in tables.reward_model_text({**summary, 'reward_model': model})


def test_the_method_says_what_was_matched_and_how_intervals_were_made(summary):
  facts = dict(tables.method(summary))
  assert facts['Start'] == 'the same <b>SFT</b> parameters'
  assert 'same 60 held-out prompts' in facts['Intervals']
  assert '400 samples of a prompt' in facts['Optimum']
  assert 'One seed' not in facts


def test_single_seeds_are_pointed_out(summary):
  rows = [row for row in summary['rows'] if row['seed'] != 1]
  assert dict(tables.method({**summary, 'rows': rows}))['One seed'].startswith('ppo, dpo ran with')


def test_what_was_paid_has_a_column_if_anybody_was_paid_otherwise(summary):
  """A dash stands where an objective was paid gold or proxy reward, or nothing."""
  assert 'Reward paid' not in tables.final_table(summary, pooled=True).header
  paid = copy.deepcopy(summary)
  for row in paid['rows']:
    if row['objective'] == 'ppo':
      row['reward'] = {'mean': 5.0, 'low': 4.0, 'high': 6.0}
  for pooled in (True, False):
    table = tables.final_table(paid, pooled=pooled)
    column = table.header.index('Reward paid')
    assert all(len(row) == len(table.header) for row in table.rows)
    for row in table.rows:
      assert row[column] == ('5.00 [4.00, 6.00]' if row[0] == 'ppo' else '–')
