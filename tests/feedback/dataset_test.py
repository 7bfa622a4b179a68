"""A set of feedback says what it lacks, and is told apart by its content."""

import dataclasses

import pytest

from rlhf_jax.common.errors import DataError
from rlhf_jax.feedback.dataset import Feedback, Split
from rlhf_jax.feedback.records import Comparison, Demonstration, Prompt

PAIR = Comparison('How?', 'So.', 'Thus.')
TRAIN = Split((Prompt('How?'),), (Demonstration('How?', 'So.'),), (PAIR,))


def test_records_that_are_there_are_given():
  assert Feedback('jsonl:x', TRAIN, Split()).require('train', 'comparisons') == (PAIR,)


def test_a_source_without_comparisons_says_so_and_what_it_has():
  feedback = Feedback('jsonl:x', dataclasses.replace(TRAIN, comparisons=()), Split())
  with pytest.raises(
    DataError, match="jsonl:x: no train comparisons; found {'prompts': 1"
  ) as caught:
    feedback.require('train', 'comparisons')
  assert 'Name a source that has comparisons' in str(caught.value)


def test_nothing_held_out_asks_to_hold_something_out():
  with pytest.raises(DataError, match='no held_out comparisons.*data.held_out'):
    Feedback('jsonl:x', TRAIN, Split()).require('held_out', 'comparisons')


def test_texts_are_every_prompt_and_response_in_order():
  assert list(TRAIN.texts()) == ['How?', 'How?', 'So.', 'How?', 'So.', 'Thus.']


def test_the_fingerprint_depends_on_content_order_and_side_and_on_nothing_else():
  base = Feedback('a', TRAIN, Split()).fingerprint
  other = Comparison('How?', 'So.', 'Thus.', margin=1.0)
  twice = dataclasses.replace(TRAIN, comparisons=(PAIR, other))
  turned = dataclasses.replace(TRAIN, comparisons=(other, PAIR))
  found = [
    base,
    Feedback('a', Split(), TRAIN).fingerprint,
    Feedback('a', dataclasses.replace(TRAIN, comparisons=(other,)), Split()).fingerprint,
    Feedback('a', twice, Split()).fingerprint,
    Feedback('a', turned, Split()).fingerprint,
  ]
  assert len(set(found)) == len(found)
  assert Feedback('b', TRAIN, Split(), quarantined=3).fingerprint == base
