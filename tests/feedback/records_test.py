"""Records refuse, where they are made, what no stage could learn from."""

import math
from typing import Any

import pytest

from rlhf_jax.common.errors import DataError
from rlhf_jax.feedback.records import Comparison, Demonstration, Prompt, RecordError

GOOD: dict[str, Any] = {'prompt': 'How?', 'chosen': 'So.', 'rejected': 'Thus.'}


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


@pytest.mark.parametrize('kind, field', [(Comparison, 'rejected'), (Demonstration, 'response')])
def test_a_missing_field_is_named(kind, field):
  with pytest.raises(RecordError, match=f"field '{field}': missing; the record has"):
    kind.from_dict({'prompt': 'How?', 'chosen': 'So.'})


def test_empty_demonstrations_are_refused():
  with pytest.raises(RecordError, match="field 'response': empty response"):
    Demonstration('How?', '\t')
