"""Columns assemble the batch that belongs to their kind, row by row."""

import numpy as np
import pytest

from rlhf_jax.common.types import Pairs, Prompts, Rankings, Ratings, Sequences, StepRatings
from rlhf_jax.data.columns import JUDGED, Columns, Ragged
from rlhf_jax.feedback.dataset import KINDS

RESPONSES = [[5], [6, 7], [6, 7], [8], [9, 9, 9], []]


def _columns(kind: str, slots: np.ndarray, **extras: np.ndarray) -> Columns:
  return Columns(
    kind=kind,
    prompts=Ragged.of([[1, row] for row in range(len(slots))]),
    responses=Ragged.of(RESPONSES),
    slots=slots,
    prompt_length=3,
    response_length=4,
    pad_id=0,
    extras=extras,
    statistics={},
  )


def test_ragged_rows_are_padded_on_either_side():
  ragged = Ragged.of(RESPONSES)
  tokens, mask = ragged.take(np.array([[4, 0], [5, 1]]), 3, -1, left=False)
  assert tokens.tolist() == [[[9, 9, 9], [5, -1, -1]], [[-1, -1, -1], [6, 7, -1]]]
  assert mask.tolist() == (tokens != -1).tolist()
  tokens, mask = ragged.take(np.array([1, 5]), 3, -1, left=True)
  assert tokens.tolist() == [[-1, 6, 7], [-1, -1, -1]] and tokens.dtype == np.int32
  assert mask.tolist() == [[False, True, True], [False, False, False]]


@pytest.mark.parametrize(
  'kind, slots, extras, expected',
  [
    ('prompts', np.zeros((3, 0), int), {}, Prompts),
    ('demonstrations', np.array([2, 0, 1]), {}, Sequences),
    (
      'comparisons',
      np.array([[0, 1], [2, 3], [4, 0]]),
      {'preference': np.ones(3), 'margin': np.arange(3.0)},
      Pairs,
    ),
    ('ratings', np.array([2, 0, 1]), {'score': np.arange(3.0)}, Ratings),
    (
      'rankings',
      np.array([[0, 1, 3], [2, 3, 2], [4, 0, 4]]),
      {'rank': np.ones((3, 3)), 'mask': np.ones((3, 3), bool)},
      Rankings,
    ),
    (
      'step_ratings',
      np.array([2, 0, 1]),
      {'score': np.ones((3, 4)), 'score_mask': np.ones((3, 4), bool)},
      StepRatings,
    ),
  ],
)
def test_each_kind_makes_its_batch_of_the_slots_of_its_rows(kind, slots, extras, expected):
  columns, rows = _columns(kind, slots, **extras), np.array([2, 0, 2])
  batch = columns.take(rows)
  assert type(batch) is expected and len(columns) == 3
  for name, array in extras.items():
    np.testing.assert_array_equal(getattr(batch, name), array[rows])
  if isinstance(batch, Prompts):
    assert batch.index.tolist() == [2, 0, 2]
    return
  sequences = batch if isinstance(batch, Sequences) else batch.sequences
  lead = slots[rows].shape
  assert sequences.prompt.shape == (*lead, 3) and sequences.response.shape == (*lead, 4)
  for place in np.ndindex(*lead):
    assert sequences.prompt[place].tolist() == [0, 1, rows[place[0]]]
    response = RESPONSES[slots[(rows[place[0]], *place[1:])]]
    assert sequences.response[place][sequences.response_mask[place]].tolist() == response


def test_every_kind_has_a_batch():
  assert {'prompts', 'demonstrations', *JUDGED} == set(KINDS)


def test_rows_are_identical_where_different_records_have_the_same_tokens():
  """A slot that a row repeats is the same record and does not count."""
  assert _columns('rankings', np.array([[1, 2, 0], [0, 3, 0], [4, 4, 5]])).identical() == 1


def test_statistics_are_added_to_those_that_are_there():
  columns = _columns('ratings', np.array([0])).count(rows=1).count(cut=2)
  assert columns.statistics == {'rows': 1, 'cut': 2}
