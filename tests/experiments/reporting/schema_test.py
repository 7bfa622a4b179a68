"""The schema of summary.json is a contract: what it holds, and what is refused."""

import copy

import pytest

from experiments.reporting.schema import validate_summary
from rlhf_jax.common.errors import DataError


def test_the_names_of_the_schema_are_those_of_the_contract(summary):
  """Others script against these very names: none may be renamed."""
  assert summary['schema'] == 1
  assert {'schema', 'rows', 'optimum', 'reward_model', 'findings'} <= set(summary)
  for row in summary['rows']:
    estimates = ('gold_reward', 'proxy_reward', 'kl', 'win_rate', 'length')
    assert set(row) == {'objective', 'seed', 'step', 'tokens', 'seconds', *estimates}
    assert all(set(row[name]) == {'mean', 'low', 'high'} for name in estimates)
  for point in summary['optimum']:
    assert {'kl', 'gold_reward'} <= set(point)
    assert set(point['gold_reward']) == {'mean', 'low', 'high'}
  assert {'accuracy', 'bayes_accuracy'} <= set(summary['reward_model'])


@pytest.mark.parametrize(
  ('path', 'value', 'message'),
  [
    (('schema',), 2, 'summary.schema: expected 1, got 2'),
    (('rows', 0, 'seed'), 1.5, r'rows\[0\].seed: expected an integer'),
    (('rows', 0, 'seed'), True, r'rows\[0\].seed'),
    (('rows', 0, 'objective'), '', r'rows\[0\].objective'),
    (('rows', 1, 'step'), -1, r'rows\[1\].step'),
    (('rows', 0, 'tokens'), None, r'rows\[0\].tokens: expected a finite number, got None'),
    (('rows', 0, 'kl', 'mean'), float('nan'), r'rows\[0\].kl.mean: expected a finite number'),
    (('rows', 0, 'kl'), {'mean': 1, 'low': 2, 'high': 3}, 'low <= mean <= high'),
    (('rows', 0, 'win_rate'), 0.5, r'rows\[0\].win_rate: expected an object'),
    (('optimum', 1, 'kl'), 0.0, r'optimum\[1\].kl: expected more than'),
    (('reward_model', 'accuracy'), 80, 'reward_model.accuracy: expected a number between'),
    (('findings',), 'text', 'findings: expected a list'),
    (('findings',), [1], r'findings\[0\]: expected text'),
  ],
)
def test_a_bad_field_is_named(summary, path, value, message):
  bad = copy.deepcopy(summary)
  place = bad
  for name in path[:-1]:
    place = place[name]
  place[path[-1]] = value
  with pytest.raises(DataError, match=message):
    validate_summary(bad)


def test_missing_fields_and_rows_said_twice_are_refused(summary):
  bad = copy.deepcopy(summary)
  del bad['rows'][2]['length']
  with pytest.raises(DataError, match=r'rows\[2\]: expected the fields length'):
    validate_summary(bad)
  bad = copy.deepcopy(summary)
  bad['rows'].append(bad['rows'][0])
  with pytest.raises(DataError, match='no other row has'):
    validate_summary(bad)


def test_what_may_be_unknown_may_be_absent(summary):
  """No optimum, no known label noise, and fields of a later version."""
  validate_summary(
    {
      **summary,
      'optimum': [],
      'reward_model': {'accuracy': 0.7, 'bayes_accuracy': None},
      'of_a_later_version': 1,
    }
  )


def test_what_objectives_are_paid_is_an_estimate_where_it_is_there(summary):
  paid = copy.deepcopy(summary)
  paid['rows'][1]['reward'] = {'mean': 1.0, 'low': 0.5, 'high': 1.5}
  validate_summary(paid)
  paid['rows'][1]['reward'] = 1.0
  with pytest.raises(DataError, match=r'rows\[1\].reward: expected an object'):
    validate_summary(paid)
