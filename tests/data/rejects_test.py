"""Bad records are an error, or are all to be found in the side file; never neither."""

import json

import pytest

from rlhf_jax.common.errors import DataError
from rlhf_jax.data.rejects import Rejects
from rlhf_jax.feedback.records import RecordError


def _rejects() -> Rejects:
  rejects = Rejects()
  rejects.add('a.jsonl', 3, RecordError('chosen', 'empty response'), '{"chosen": ""}')
  rejects.add('b.jsonl', 1, RecordError('', 'not JSON'), 'né')
  return rejects


def test_strict_raises_for_the_first_and_counts_the_rest():
  with pytest.raises(
    DataError, match=r"^a.jsonl:3: field 'chosen': empty response. 1 more are bad"
  ):
    _rejects().settle('strict', None)


def test_quarantine_writes_place_reason_and_text_of_each(tmp_path, caplog):
  side = tmp_path / 'run' / 'quarantine.jsonl'
  assert _rejects().settle('quarantine', side) == 2
  rows = [json.loads(line) for line in side.read_text(encoding='utf-8').splitlines()]
  assert rows == [
    {
      'source': 'a.jsonl',
      'number': 3,
      'field': 'chosen',
      'reason': 'empty response',
      'raw': '{"chosen": ""}',
    },
    {'source': 'b.jsonl', 'number': 1, 'field': '', 'reason': 'not JSON', 'raw': 'né'},
  ]
  assert '2 bad records set aside' in caplog.text


def test_without_bad_records_nothing_is_written(tmp_path):
  assert Rejects().settle('quarantine', tmp_path / 'side.jsonl') == 0
  assert not (tmp_path / 'side.jsonl').exists()
  assert Rejects().settle('strict', None) == 0


def test_quarantine_needs_a_side_file_even_before_there_is_a_bad_record():
  with pytest.raises(ValueError, match='needs the path of a side file'):
    Rejects().settle('quarantine', None)
