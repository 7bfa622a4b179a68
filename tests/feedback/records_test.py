"""Records refuse, where they are made, what no stage could learn from."""

import json
import math
from typing import Any

import pytest

from rlhf_jax.common.errors import DataError
from rlhf_jax.feedback.records import (
  Comparison,
  Demonstration,
  Prompt,
  Ranking,
  Rating,
  RecordError,
  StepRating,
)

GOOD: dict[str, Any] = {'prompt': 'How?', 'chosen': 'So.', 'rejected': 'Thus.'}
RATING: dict[str, Any] = {'prompt': 'How?', 'response': 'So.', 'score': 0.5}
RANKING: dict[str, Any] = {'prompt': 'How?', 'responses': ['a', 'b', 'c'], 'ranks': [2, 1, 2]}
STEPS: dict[str, Any] = {'prompt': 'How?', 'steps': ['So.', 'Thus.'], 'scores': [1, -0.5]}


def test_a_comparison_survives_the_way_to_a_mapping_and_back():
  pair = Comparison('How?', 'So.', 'Thus.', preference=0.75, margin=2.0, annotator='ann')
  assert Comparison.from_dict(pair.to_dict()) == pair
  assert Comparison.from_dict({**GOOD, 'line': 7, 'subset': 'x'}) == Comparison(**GOOD)


@pytest.mark.parametrize('record', [Prompt(''), Demonstration('', 'So.'), Comparison('', 'a', 'b')])
def test_a_prompt_may_be_empty(record):
  assert type(record).from_dict(record.to_dict()) == record


@pytest.mark.parametrize(
  'field, value, reason',
  [
    ('prompt', None, 'expected text, got NoneType'),
    ('chosen', ['a turn'], 'expected text, got list'),
    ('chosen', ' \n', 'empty response'),
    ('rejected', '', 'empty response'),
    ('rejected', ' So. ', 'the same text as chosen'),
    ('rejected', 'half \ud800', 'half a surrogate pair at character 5'),
    ('preference', 0.4, 'swap chosen and rejected'),
    ('preference', 1.5, r'not in \[0.5, 1\]'),
    ('preference', True, 'expected a finite number'),
    ('preference', '1', 'expected a finite number'),
    ('margin', math.nan, 'expected a finite number'),
    ('margin', -1, 'is negative'),
    ('annotator', 3, 'expected text, got int'),
  ],
)
def test_a_bad_field_is_named_with_the_reason(field, value, reason):
  with pytest.raises(RecordError, match=reason) as caught:
    Comparison.from_dict({**GOOD, field: value})
  assert caught.value.field == field
  assert isinstance(caught.value, DataError)


@pytest.mark.parametrize(
  'record',
  [
    Rating('', 'So.', -3, 'ann'),
    Ranking('How?', ('a', 'b'), (1, 2), 'ann'),
    Ranking('How?', ('a', 'b', 'c', 'd'), (2, 2, 1, 2)),
    StepRating('How?', ('So.',), (0.5,)),
    StepRating('', ('a', 'b'), (1, -1.0), 'ann', '\n\n'),
  ],
)
def test_other_records_survive_the_way_through_json(record):
  """Tuples come back from lists as tuples, so that records can be compared and hashed."""
  fields = json.loads(json.dumps(record.to_dict()))
  again = type(record).from_dict({**fields, 'line': 3})
  assert again == record and hash(again) == hash(record)


def test_a_response_is_its_steps_with_the_separator_between_them():
  assert StepRating('', ('x = 1', 'y = 2'), (1, 1)).response == 'x = 1 y = 2'
  assert StepRating('', ('x = 1', 'y = 2'), (1, 1), separator='\n').response == 'x = 1\ny = 2'
  assert StepRating('', ('x = 1\n', 'y = 2'), (1, 1), separator='').response == 'x = 1\ny = 2'


@pytest.mark.parametrize(
  'kind, good, field, value, reason',
  [
    (Rating, RATING, 'prompt', 1, 'expected text, got int'),
    (Rating, RATING, 'response', '', 'empty response'),
    (Rating, RATING, 'score', True, 'expected a finite number'),
    (Rating, RATING, 'score', math.inf, 'expected a finite number'),
    (Rating, RATING, 'score', math.nan, 'expected a finite number'),
    (Rating, RATING, 'score', 10**400, 'expected a finite number'),
    (Rating, RATING, 'score', 1e39, 'expected a finite number'),
    (Rating, RATING, 'annotator', None, 'expected text, got NoneType'),
    (Ranking, RANKING, 'responses', 'abc', 'expected a list .*, got str'),
    (Ranking, RANKING, 'responses', ['a'], 'expected at least 2, got 1'),
    (Ranking, RANKING, 'ranks', 1, 'expected a list .*, got int'),
    (Ranking, RANKING, 'ranks', [1, 2], '2 of them for 3 responses'),
    (Ranking, RANKING, 'ranks', [2, 3, 2], 'the smallest is 2; the best has rank 1'),
    (Ranking, RANKING, 'ranks', [1, 1, 1], 'all equal: the ranking says nothing'),
    (Ranking, RANKING, 'annotator', 3, 'expected text, got int'),
    (StepRating, STEPS, 'steps', [], 'expected at least 1, got 0'),
    (StepRating, STEPS, 'scores', [1], '1 of them for 2 steps'),
    (StepRating, STEPS, 'separator', None, 'expected text, got NoneType'),
  ],
)
def test_a_bad_field_of_the_others_is_named_with_the_reason(kind, good, field, value, reason):
  with pytest.raises(RecordError, match=reason) as caught:
    kind.from_dict({**good, field: value})
  assert caught.value.field == field


@pytest.mark.parametrize(
  'kind, good, field, number, value, reason',
  [
    (Ranking, RANKING, 'responses', 1, ' ', 'empty response'),
    (Ranking, RANKING, 'responses', 2, 5, 'expected text, got int'),
    (Ranking, RANKING, 'responses', 2, ' a ', r'the same text as responses\[0\]'),
    (Ranking, RANKING, 'ranks', 0, 0, 'expected an integer from 1 to 3, got 0'),
    (Ranking, RANKING, 'ranks', 1, 1.0, 'expected an integer from 1 to 3, got 1.0'),
    (Ranking, RANKING, 'ranks', 2, True, 'expected an integer from 1 to 3, got True'),
    (Ranking, RANKING, 'ranks', 2, 4, 'expected an integer from 1 to 3, got 4'),
    (StepRating, STEPS, 'steps', 0, '', 'empty response'),
    (StepRating, STEPS, 'steps', 1, None, 'expected text, got NoneType'),
    (StepRating, STEPS, 'scores', 1, True, 'expected a finite number'),
    (StepRating, STEPS, 'scores', 0, -math.inf, 'expected a finite number'),
  ],
)
def test_a_bad_item_of_a_list_is_named_by_its_number(kind, good, field, number, value, reason):
  items = [*good[field]]
  items[number] = value
  with pytest.raises(RecordError, match=reason) as caught:
    kind.from_dict({**good, field: items})
  assert caught.value.field == f'{field}[{number}]'


def test_lists_are_refused_where_a_record_is_made_in_python():
  """Only tuples can be hashed; `from_dict` makes them of JSON's lists."""
  with pytest.raises(RecordError, match='a tuple in Python'):
    Ranking('How?', ['a', 'b'], (1, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize('kind, field', [(Comparison, 'rejected'), (Demonstration, 'response')])
def test_a_missing_field_is_named(kind, field):
  with pytest.raises(RecordError, match=f"field '{field}': missing; the record has"):
    kind.from_dict({'prompt': 'How?', 'chosen': 'So.'})


def test_empty_demonstrations_are_refused():
  with pytest.raises(RecordError, match="field 'response': empty response"):
    Demonstration('How?', '\t')
