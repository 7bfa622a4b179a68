"""A set of feedback says what it lacks, and is told apart by its content."""

import dataclasses

import numpy as np
import pytest

from rlhf_jax.common.errors import DataError
from rlhf_jax.feedback.dataset import KINDS, Deferred, Feedback, Split
from rlhf_jax.feedback.dialogues import Message
from rlhf_jax.feedback.records import (
  Comparison,
  Demonstration,
  Prompt,
  Ranking,
  Rating,
  StepRating,
)

RATINGS = (Rating('How?', 'So.', 1), Rating('How?', 'Thus.', 0.5))
RANKING = Ranking('How?', ('So.', 'Thus.', 'Hm.'), (1, 2, 2))
STEPS = StepRating('How?', ('So.', 'Thus.'), (1, 0), separator='\n')
PAIR = Comparison('How?', 'So.', 'Thus.')
PROBABILITY = np.array([0.9, 0.3])
TRAIN = Split((Prompt('How?'),), (Demonstration('How?', 'So.'),), (PAIR,))


def test_records_that_are_there_are_given():
  assert Feedback('jsonl:x', TRAIN, Split()).require('train', 'comparisons') == (PAIR,)


def test_a_source_without_comparisons_says_so_and_what_it_has():
  feedback = Feedback('jsonl:x', dataclasses.replace(TRAIN, comparisons=()), Split())
  with pytest.raises(
    DataError, match="jsonl:x: no train comparisons; found {'prompts': 1"
  ) as caught:
    feedback.require('train', 'comparisons')
  assert str(caught.value).endswith(
    'Name a source that has comparisons: no converter makes them from what this one has.'
  )


@pytest.mark.parametrize(
  'split, kind, ways',
  [
    (Split(ratings=RATINGS), 'comparisons', ['ratings_to_comparisons (from ratings)']),
    (Split(rankings=(RANKING,)), 'ratings', ['rankings_to_ratings (from rankings)']),
    (
      Split(rankings=(RANKING,), ratings=RATINGS),
      'comparisons',
      ['ratings_to_comparisons (from ratings)', 'rankings_to_comparisons (from rankings)'],
    ),
    (
      Split(step_ratings=(STEPS,)),
      'ratings',
      [
        'step_ratings_to_ratings_min (from step_ratings)',
        'step_ratings_to_ratings_last (from step_ratings)',
      ],
    ),
    (Split(ratings=RATINGS), 'step_ratings', []),
  ],
)
def test_what_is_missing_is_refused_with_the_converters_that_would_make_it(split, kind, ways):
  """DPO on ratings, KTO on rankings: the message is the next command's argument."""
  with pytest.raises(DataError, match=f'x: no train {kind}; found ') as caught:
    Feedback('x', split, Split()).require('train', kind)
  for found, size in split.sizes.items():
    assert f"'{found}': {size}" in str(caught.value)
  assert str(caught.value).count('--config.data.convert=') == len(ways)
  for way in ways:
    assert f'--config.data.convert={way}' in str(caught.value)


def test_converted_records_replace_those_of_their_kind_on_both_sides():
  split = Split(comparisons=(PAIR,), ratings=RATINGS)
  feedback = Feedback('x', split, split, label_probability=PROBABILITY).converted(
    'ratings_to_comparisons'
  )
  for side in (feedback.train, feedback.held_out):
    assert side.comparisons == (Comparison('How?', 'So.', 'Thus.', margin=0.5),)
    assert side.ratings == RATINGS
  assert feedback.bayes_accuracy() is None  # it was that of other comparisons
  other = Feedback('x', split, split, label_probability=PROBABILITY).converted(
    'comparisons_to_ratings'
  )
  assert other.bayes_accuracy(1) == pytest.approx(0.9)
  assert other.bayes_accuracy() == pytest.approx(0.8) and len(other.train.ratings) == 2


def test_a_converter_without_anything_to_read_or_to_give_is_refused():
  with pytest.raises(
    DataError, match='convert=rankings_to_ratings reads rankings; found'
  ) as caught:
    Feedback('x', Split(ratings=RATINGS), Split()).converted('rankings_to_ratings')
  assert 'ratings_to_comparisons, ratings_to_rankings' in str(caught.value)
  with pytest.raises(DataError, match='Name a source that has rankings, or no converter'):
    Feedback('x', Split((Prompt('How?'),)), Split()).converted('rankings_to_ratings')
  with pytest.raises(DataError, match='makes no comparisons of 1 ratings. It takes different'):
    Feedback('x', Split(ratings=RATINGS[:1]), Split()).converted('ratings_to_comparisons')
  ties = Split(comparisons=(Comparison('How?', 'So.', 'Thus.', 0.5),))
  with pytest.raises(DataError, match='makes no rankings of 1 comparisons. Ties give none'):
    Feedback('x', ties, Split()).converted('comparisons_to_rankings')


def test_deferred_records_are_made_when_they_are_read_and_once():
  calls = []

  def make() -> tuple[Rating, ...]:
    calls.append(1)
    return RATINGS

  def feedback(origin: str) -> Feedback:
    return Feedback('x', Split(ratings=Deferred(2, make, origin)), Split())

  one = feedback('a')
  assert len(one.train.ratings) == 2 and one.train.sizes == {'ratings': 2}
  assert list(one.train.texts()) == []
  assert one.fingerprint == feedback('a').fingerprint != feedback('b').fingerprint
  assert not calls
  assert one.require('train', 'ratings') == RATINGS
  assert one.train.ratings[1] == RATINGS[1] and tuple(one.train.ratings[:1]) == RATINGS[:1]
  assert tuple(one.train.ratings) == RATINGS
  assert len(calls) == 1
  before = feedback('a').fingerprint
  assert one.fingerprint == before  # reading them changes nothing


def test_nothing_held_out_asks_to_hold_something_out():
  with pytest.raises(DataError, match='no held_out comparisons.*data.held_out'):
    Feedback('jsonl:x', TRAIN, Split()).require('held_out', 'comparisons')


def test_texts_are_every_prompt_and_response_in_order():
  assert list(TRAIN.texts()) == ['How?', 'How?', 'So.', 'How?', 'So.', 'Thus.']
  split = Split(ratings=RATINGS[:1], rankings=(RANKING,), step_ratings=(STEPS,))
  assert list(split.texts()) == [
    *('How?', 'So.'),
    *('How?', 'So.', 'Thus.', 'Hm.'),
    *('How?', 'So.\nThus.'),
  ]


def test_dialogues_are_texts_as_they_are_written():
  asked, said = (Message('user', 'How?'),), (Message('assistant', 'So.'), Message('user', 'Why?'))
  turns = (*said, Message('assistant', 'Thus.'))
  split = Split(demonstrations=(Demonstration(asked, turns), Demonstration(asked, 'So.')))
  assert list(split.texts()) == ['How?\nSo.\nWhy?\nThus.', 'How?', 'So.']
  assert list(split.texts(lambda dialogue: f'{len(dialogue)}')) == ['4', '1', 'So.']


def test_every_kind_counts_in_the_fingerprint():
  records = ((Prompt('a'),), (Demonstration('a', 'b'),), (PAIR,), RATINGS, (RANKING,), (STEPS,))
  found = {
    Feedback('x', Split(**{kind: some}), Split()).fingerprint  # type: ignore[arg-type]
    for kind, some in zip(KINDS, records, strict=True)
  }
  assert len(found) == len(KINDS)


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
