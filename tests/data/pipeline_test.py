"""Batches hold what records say, padded where the layout says, in an order fixed by the seed."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from rlhf_jax.common.errors import DataError
from rlhf_jax.common.types import Pairs, Prompts, Rankings, Ratings, Sequences, StepRatings
from rlhf_jax.data import pipeline, tokenizers
from rlhf_jax.data.config import DataConfig
from rlhf_jax.data.packing import Packer
from rlhf_jax.feedback.dataset import KINDS
from rlhf_jax.feedback.records import (
  Comparison,
  Demonstration,
  Prompt,
  Ranking,
  Rating,
  StepRating,
)

CONFIG = DataConfig(prompt_length=4, response_length=4)
WORDS = 'a b c d e f g h'
WORD = tokenizers.train('word', [WORDS], 100)
PAD, BOS, EOS = 0, 1, 2


def _ids(text: Any) -> list[int]:
  return WORD.encode_batch([text])[0]


def _take(columns: pipeline.Columns, *rows: int) -> Any:
  """The batch of these rows, of whichever kind."""
  return columns.take(np.array(rows))


def _comparisons(count: int) -> list[Comparison]:
  rng = np.random.default_rng(0)

  def draw() -> str:
    return ' '.join(rng.choice(WORDS.split(), size=rng.integers(1, 7)))

  return [Comparison(draw(), draw() + ' a', draw() + ' b', 0.75, row) for row in range(count)]


def test_prompts_are_padded_on_the_left_after_their_beginning():
  columns = pipeline.encode_prompts([Prompt('a'), Prompt('a b c')], WORD, CONFIG)
  batch = _take(columns, 0, 1)
  assert isinstance(batch, Prompts)
  np.testing.assert_array_equal(batch.tokens, [[PAD, PAD, BOS, *_ids('a')], [BOS, *_ids('a b c')]])
  np.testing.assert_array_equal(batch.mask, [[False, False, True, True], [True] * 4])
  np.testing.assert_array_equal(batch.index, [0, 1])
  assert batch.tokens.dtype == batch.index.dtype == np.int32 and batch.mask.dtype == bool


@pytest.mark.parametrize('truncation, kept', [('keep_end', 'c d e'), ('keep_start', 'a b c')])
def test_a_long_prompt_keeps_its_beginning_token_and_one_end(truncation, kept):
  config = dataclasses.replace(CONFIG, truncation=truncation)
  columns = pipeline.encode_prompts([Prompt('a b c d e')], WORD, config)
  assert _take(columns, 0).tokens.tolist() == [[BOS, *_ids(kept)]]
  assert columns.statistics['prompts_cut'] == 1


def test_responses_end_with_eos_unless_they_are_cut():
  """The mask comes from lengths; a response of exactly R words has no room for its end."""
  texts = ['a', 'a b c', 'a b c d', 'a b c d e']
  columns = pipeline.encode_demonstrations([Demonstration('h', x) for x in texts], WORD, CONFIG)
  batch = _take(columns, 0, 1, 2, 3)
  assert isinstance(batch, Sequences)
  expected = [[*_ids('a'), EOS, PAD, PAD], [*_ids('a b c'), EOS], _ids('a b c d'), _ids('a b c d')]
  np.testing.assert_array_equal(batch.response, expected)
  np.testing.assert_array_equal(batch.response_mask.sum(-1), [2, 4, 4, 4])
  np.testing.assert_array_equal(batch.prompt, [[PAD, PAD, BOS, *_ids('h')]] * 4)
  assert columns.statistics == {'rows': 4, 'prompts_cut': 0, 'responses_cut': 2}


def test_padding_is_told_by_the_mask_where_pad_is_the_end_token():
  same = dataclasses.replace(WORD, pad_id=EOS)
  columns = pipeline.encode_demonstrations([Demonstration('h', 'a')], same, CONFIG)
  batch = _take(columns, 0)
  assert batch.response.tolist() == [[*_ids('a'), EOS, EOS, EOS]]
  assert batch.response_mask.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize('share, copies', [(True, 1), (False, 2)])
def test_pairs_have_the_chosen_response_first_and_one_prompt(share, copies):
  pair = Comparison('h', 'a b', 'c', preference=0.75, margin=2.0)
  config = dataclasses.replace(CONFIG, share_prompts=share)
  batch = _take(pipeline.encode_comparisons([pair, pair], WORD, config), 1)
  assert isinstance(batch, Pairs)
  assert batch.sequences.response.tolist() == [
    [[*_ids('a b'), EOS, PAD], [*_ids('c'), EOS, PAD, PAD]]
  ]
  assert batch.sequences.prompt.tolist() == [[[PAD, PAD, BOS, *_ids('h')]] * copies]
  assert batch.sequences.shares_prompts == share
  assert (batch.preference.tolist(), batch.margin.tolist()) == ([0.75], [2.0])
  assert batch.preference.dtype == batch.margin.dtype == np.float32
  assert batch.reference_logprobs is None


def test_pairs_that_the_cut_makes_identical_are_counted():
  pairs = [Comparison('h', 'a b c d e', 'a b c d f'), Comparison('h', 'a', 'b')]
  columns = pipeline.encode_comparisons(pairs, WORD, CONFIG)
  assert columns.statistics['identical_pairs'] == 1


def test_rows_equal_a_slow_assembly_one_by_one():
  pairs = _comparisons(20)
  columns = pipeline.encode_comparisons(pairs, WORD, CONFIG)
  rows = [3, 3, 19, 0]
  batch = _take(columns, *rows)
  for place, row in enumerate(rows):
    prompt = [BOS, *_ids(pairs[row].prompt)[-3:]]
    assert batch.sequences.prompt[place, 0].tolist() == [PAD] * (4 - len(prompt)) + prompt
    for side, text in enumerate((pairs[row].chosen, pairs[row].rejected)):
      response = [*_ids(text), EOS][:4]
      mask = batch.sequences.response_mask[place, side]
      assert batch.sequences.response[place, side][mask].tolist() == response
      assert mask.tolist() == [True] * len(response) + [False] * (4 - len(response))
    assert batch.margin[place] == row


def test_ratings_have_one_response_and_its_score():
  ratings = [Rating('h', 'a b', -0.5), Rating('g', 'c', 2)]
  batch = _take(pipeline.encode_ratings(ratings, WORD, CONFIG), 1, 0)
  assert isinstance(batch, Ratings)
  assert batch.score.tolist() == [2.0, -0.5] and batch.score.dtype == np.float32
  assert batch.sequences.response.tolist() == [
    [*_ids('c'), EOS, PAD, PAD],
    [*_ids('a b'), EOS, PAD],
  ]
  assert batch.reference_logprobs is None


RANKINGS = [
  Ranking('h', ('a', 'b c'), (2, 1)),
  Ranking('g', ('a', 'b', 'c', 'd'), (3, 1, 3, 2)),
  Ranking('f', ('e', 'f', 'g'), (1, 2, 2)),
]


def test_shorter_rankings_repeat_their_first_response_where_the_mask_is_false():
  batch = _take(pipeline.encode_rankings(RANKINGS, WORD, CONFIG), 2, 0, 1)
  assert isinstance(batch, Rankings)
  assert batch.sequences.response.shape == (3, 4, 4)
  assert batch.mask.tolist() == [[True] * 3 + [False], [True] * 2 + [False] * 2, [True] * 4]
  for place, record in enumerate((RANKINGS[2], RANKINGS[0], RANKINGS[1])):
    for slot in range(4):
      number = slot if slot < len(record.responses) else 0
      real = batch.sequences.response_mask[place, slot]
      expected = [*_ids(record.responses[number]), EOS]
      assert batch.sequences.response[place, slot][real].tolist() == expected
      assert batch.rank[place, slot] == record.ranks[number]
    assert batch.sequences.prompt[place].tolist() == [[PAD, PAD, BOS, *_ids(record.prompt)]]
  assert batch.rank.dtype == np.int32 and batch.mask.dtype == bool


def test_rankings_with_responses_that_the_cut_makes_identical_are_counted():
  """The repetitions of a shorter ranking are no such responses."""
  cut = Ranking('h', ('a b c d e', 'f', 'a b c d g'), (1, 2, 3))
  columns = pipeline.encode_rankings([*RANKINGS, cut], WORD, CONFIG)
  assert columns.statistics['identical_responses'] == 1


def test_steps_are_scored_at_their_last_token():
  record = StepRating('h', ('a b', 'c', 'd e'), (0.5, -1, 2))
  config = dataclasses.replace(CONFIG, response_length=7)
  batch = _take(pipeline.encode_step_ratings([record], WORD, config), 0)
  assert isinstance(batch, StepRatings)
  assert batch.sequences.response.tolist() == [[*_ids('a b c d e'), EOS, PAD]]
  assert batch.score.tolist() == [[0, 0.5, -1, 0, 2, 0, 0]]
  assert batch.score_mask.tolist() == [[False, True, True, False, True, False, False]]
  assert batch.score.dtype == np.float32 and batch.score_mask.dtype == bool


@pytest.mark.parametrize('length, kept', [(1, 0), (2, 1), (4, 2), (5, 3), (6, 3)])
def test_a_step_that_is_cut_anywhere_has_no_score(length, kept):
  record = StepRating('h', ('a b', 'c', 'd e'), (0, 0, 0))  # a score of 0 is a score
  config = dataclasses.replace(CONFIG, response_length=length)
  columns = pipeline.encode_step_ratings([record], WORD, config)
  batch = _take(columns, 0)
  assert batch.score_mask.sum() == kept and columns.statistics['steps_cut'] == 3 - kept


@pytest.mark.parametrize('separator', [' ', '\n', '\n\n', ' => ', ''])
def test_steps_end_where_their_text_ends_in_the_tokens_of_the_whole(separator):
  """Byte-level pieces, with letters of several bytes: the tokens up to a step's last one spell all
  up to its end, and perhaps the beginning of a separator that shares the token."""
  rng = np.random.default_rng(0)
  words = ['☺', 'größer', 'x = 1', 'so,', '  two', 'naïve.', 'end.\n']
  steps = [tuple(map(str, rng.choice(words, size=rng.integers(1, 6)))) for _ in range(40)]
  records = [
    StepRating('p', row, tuple(range(1, len(row) + 1)), separator=separator) for row in steps
  ]
  byte = tokenizers.train('byte', words, 300)
  config = dataclasses.replace(CONFIG, prompt_length=8, response_length=80)
  columns = pipeline.encode_step_ratings(records, byte, config)
  ratings = [Rating(x.prompt, x.response, 0) for x in records]
  plain = _take(pipeline.encode_ratings(ratings, byte, config), *range(40))
  batch = _take(columns, *range(40))
  np.testing.assert_array_equal(batch.sequences.response, plain.sequences.response)
  for row, record in enumerate(records):
    places = np.flatnonzero(batch.score_mask[row])
    assert batch.score[row, places].tolist() == list(record.scores)
    assert not batch.score[row][~batch.score_mask[row]].any()
    for number, place in enumerate(places):
      text = byte.decode(batch.sequences.response[row, : place + 1])
      before = byte.decode(batch.sequences.response[row, :place])
      end = separator.join(record.steps[: number + 1])
      assert text.startswith(end) and (end + separator).startswith(text)
      assert not before.startswith(end)


def test_steps_that_share_their_last_token_are_refused():
  byte = tokenizers.train('byte', ['ab'] * 9, 300)
  record = StepRating('p', ('a', 'b'), (1, 1), separator='')
  with pytest.raises(DataError, match="prompt 'p': step 2, 'b', has no last token of its own"):
    pipeline.encode_step_ratings([record], byte, CONFIG)


def test_every_kind_is_encoded_by_name():
  records: dict[str, Any] = {
    'prompts': Prompt('a'),
    'demonstrations': Demonstration('a', 'b'),
    'comparisons': Comparison('a', 'b', 'c'),
    'ratings': Rating('a', 'b', 1),
    'rankings': RANKINGS[0],
    'step_ratings': StepRating('a', ('b',), (1,)),
  }
  assert set(pipeline.ENCODERS) == set(records) == set(KINDS)
  for kind, record in records.items():
    columns = pipeline.encode(kind, [record, record], WORD, CONFIG)
    assert columns.kind == kind and len(columns) == 2
    assert len(pipeline.encode(kind, [], WORD, CONFIG)) == 0
    rows = [rows for _, rows in pipeline.sequential(columns, 3)]
    assert [row.tolist() for row in rows] == [[True, True, False]]


def test_attached_columns_travel_with_their_rows():
  columns = pipeline.encode_comparisons(_comparisons(5), WORD, CONFIG)
  cached = np.random.default_rng(0).normal(size=(5, 2, 4)).astype(np.float32)
  attached = columns.attach(reference_logprobs=cached)
  np.testing.assert_array_equal(_take(attached, 4, 0, 4).reference_logprobs, cached[[4, 0, 4]])
  assert _take(columns, 4).reference_logprobs is None  # the original is as it was
  with pytest.raises(ValueError, match='reference_logprobs: expected 5 rows'):
    columns.attach(reference_logprobs=cached[:4])


def _rows(batches: Any, steps: range) -> list[list[int]]:
  return [batches.batch(step).index.tolist() for step in steps]


def test_the_order_is_a_function_of_seed_and_step():
  columns = pipeline.encode_prompts([Prompt('a')] * 10, WORD, CONFIG)
  forwards = _rows(pipeline.batches(columns, 4, seed=3), range(20))
  backwards = _rows(pipeline.batches(columns, 4, seed=3), range(19, -1, -1))
  assert forwards == backwards[::-1]
  assert forwards != _rows(pipeline.batches(columns, 4, seed=4), range(20))


def _step(columns: pipeline.Columns, step: int) -> Any:
  return pipeline.batches(columns, 4, seed=0).batch(step)


def test_attaching_a_column_does_not_change_the_order():
  """Caching reference log-probs must not change what a step sees."""
  columns = pipeline.encode_comparisons(_comparisons(9), WORD, CONFIG)
  cached = columns.attach(reference_logprobs=np.zeros((9, 2, 4), np.float32))
  for step in range(5):
    one, other = (_step(x, step) for x in (columns, cached))
    np.testing.assert_array_equal(one.margin, other.margin)


def test_every_epoch_holds_every_row_once_in_an_order_of_its_own():
  columns = pipeline.encode_prompts([Prompt('a')] * 12, WORD, CONFIG)
  flat = sum(_rows(pipeline.batches(columns, 4, seed=0), range(9)), [])
  epochs = [flat[start : start + 12] for start in (0, 12, 24)]
  assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_may_straddle_epochs_and_be_larger_than_the_data():
  columns = pipeline.encode_prompts([Prompt('a')] * 3, WORD, CONFIG)
  flat = sum(_rows(pipeline.batches(columns, 8, seed=0), range(3)), [])
  assert np.bincount(flat).tolist() == [8, 8, 8]


def _prompts(rows: int) -> pipeline.Columns:
  return pipeline.encode_prompts([Prompt('a')] * rows, WORD, CONFIG)


def test_weighted_rows_are_drawn_in_proportion_to_their_weights():
  """Within 4 standard errors; rows of weight 0, wherever they stand, never."""
  weights = np.array([0.0, 1.0, 3.0, 0.0, 6.0, 0.0])
  batches = pipeline.batches(_prompts(6), 50, seed=0, weights=weights)
  flat = sum(_rows(batches, range(400)), [])
  share = np.bincount(flat, minlength=6) / len(flat)
  expected = weights / weights.sum()
  assert (share[weights == 0] == 0).all()
  error = np.sqrt(expected * (1 - expected) / len(flat))
  assert (np.abs(share - expected) <= 4 * error).all()


def test_the_weighted_order_is_a_function_of_seed_step_and_proportions():
  columns, weights = _prompts(10), np.arange(10.0)
  forwards = _rows(pipeline.batches(columns, 4, 3, weights), range(20))
  backwards = _rows(pipeline.batches(columns, 4, 3, weights), range(19, -1, -1))
  assert forwards == backwards[::-1]
  assert forwards == _rows(pipeline.batches(columns, 4, 3, 1e300 * weights / 9), range(20))
  assert forwards != _rows(pipeline.batches(columns, 4, 4, weights), range(20))
  assert len({tuple(row) for row in forwards}) > 10  # steps differ
  one = np.eye(10)[7]
  assert _rows(pipeline.batches(columns, 4, 3, one), range(3)) == [[7] * 4] * 3


@pytest.mark.parametrize(
  'weights, message',
  [
    ([1.0, -0.5, 1.0], r'finite numbers >= 0, got -0.5 at 1'),
    ([1.0, 1.0, float('nan')], 'finite numbers >= 0, got nan at 2'),
    ([float('inf'), 1.0, 1.0], 'finite numbers >= 0, got inf at 0'),
    ([1.0, 1.0], r'one for each of 3 rows, got shape \(2,\)'),
    ([[1.0, 1.0, 1.0]], r'one for each of 3 rows, got shape \(1, 3\)'),
  ],
)
def test_weights_that_say_nothing_are_refused(weights, message):
  with pytest.raises(ValueError, match=message):
    pipeline.batches(_prompts(3), 2, 0, np.array(weights))


def test_rows_of_no_weight_at_all_are_refused():
  with pytest.raises(DataError, match='All rows have weight 0'):
    pipeline.batches(_prompts(3), 2, 0, np.zeros(3))


@pytest.mark.parametrize('rows, size', [(5, 2), (4, 2), (1, 8), (0, 2)])
def test_sequential_gives_every_row_once_and_says_which_are_padding(rows, size):
  columns = pipeline.encode_prompts([Prompt('a')] * rows, WORD, CONFIG)
  seen: list[int] = []
  batch: Any
  for batch, real in pipeline.sequential(columns, size):
    assert batch.tokens.shape == (size, 4) and real.shape == (size,)
    seen += batch.index[real].tolist()
  assert seen == list(range(rows))


def test_no_rows_and_no_tokens_are_errors():
  columns = pipeline.encode_prompts([], WORD, CONFIG)
  with pytest.raises(DataError, match='no rows'):
    pipeline.batches(columns, 2, seed=0)
  without = dataclasses.replace(WORD, bos_id=None)
  with pytest.raises(DataError, match="prompt '': no tokens, and the tokenizer has no <bos>"):
    pipeline.encode_prompts([Prompt('')], without, CONFIG)


@pytest.mark.parametrize('weights', [None, np.arange(1.0, 13.0)])
def test_a_process_makes_its_rows_of_the_same_batches(weights):
  """In any order of the data, drawn by weights too."""
  columns = pipeline.encode_prompts([Prompt('a')] * 12, WORD, CONFIG)
  places = np.array([1, 2, 5])
  whole = pipeline.batches(columns, 6, seed=3, weights=weights)
  part = pipeline.batches(columns, 6, seed=3, weights=weights, places=places)
  for step in range(5):
    own: Any = part.batch(step)
    both: Any = whole.batch(step)
    np.testing.assert_array_equal(own.index, both.index[places])


BUCKETS = DataConfig(prompt_length=8, response_length=8, length_buckets=4)


def _ragged(count: int, config: DataConfig, seed: int = 0) -> pipeline.Columns:
  """Demonstrations of all lengths."""
  rng = np.random.default_rng(seed)

  def draw(most: int) -> str:
    return ' '.join(rng.choice(WORDS.split(), size=rng.integers(1, most)))

  records = [Demonstration(draw(8), draw(8)) for _ in range(count)]
  return pipeline.encode_demonstrations(records, WORD, config)


def _cut(batch: Sequences) -> list[Any]:
  """The real tokens of each row."""
  pairs = ((batch.prompt, batch.prompt_mask), (batch.response, batch.response_mask))
  return [[tokens[b][mask[b]].tolist() for tokens, mask in pairs] for b in range(len(batch.prompt))]


def test_a_batch_is_as_wide_as_the_least_bucket_that_holds_it():
  """And holds what it holds at full width."""
  columns = _ragged(40, BUCKETS)
  wide = dataclasses.replace(columns, buckets=1)
  widths = set()
  for step in range(40):
    rows = [step, 3] if step % 2 else [step]
    narrow, full = _take(columns, *rows), _take(wide, *rows)
    assert _cut(narrow) == _cut(full)
    assert full.prompt.shape == full.response.shape == (len(rows), 8)
    for mask in (narrow.prompt_mask, narrow.response_mask):
      least = mask.sum(1).max()
      assert mask.shape[1] == -(-least // 2) * 2
      widths.add(mask.shape[1])
  assert widths == {2, 4, 6, 8}


def test_what_is_said_of_tokens_is_as_wide_as_they_are():
  columns = pipeline.encode_comparisons([Comparison('a', 'b', 'c')] * 2, WORD, BUCKETS)
  cached = np.random.default_rng(0).normal(size=(2, 2, 8)).astype(np.float32)
  batch = _take(columns.attach(reference_logprobs=cached), 1)
  assert batch.sequences.response.shape == (1, 2, 2)
  np.testing.assert_array_equal(batch.reference_logprobs, cached[1:, :, :2])
  steps = pipeline.encode_step_ratings([StepRating('a', ('b',), (0.5,))], WORD, BUCKETS)
  batch = _take(steps, 0)
  assert batch.score.tolist() == [[0.5, 0]] and batch.score_mask.shape == (1, 2)
  ratings = pipeline.encode_ratings([Rating('a', 'b', 1)] * 3, WORD, BUCKETS)
  assert _take(ratings, 0, 1, 2).score.shape == (3,)


def test_windows_put_rows_of_one_width_together():
  """Each window holds the rows it held before, in a function of seed and step; less is padding."""
  columns = _ragged(96, BUCKETS)
  plain = pipeline.batches(columns, 8, seed=3)
  grouped = pipeline.batches(columns, 8, seed=3, window=6)
  again = pipeline.batches(columns, 8, seed=3, window=6)
  order: Any = grouped.order
  backwards = [again.order[step].tolist() for step in range(23, -1, -1)]
  assert [order[step].tolist() for step in range(24)] == backwards[::-1]
  for start in range(0, 24, 6):
    held = [sorted(np.concatenate([o[start + k] for k in range(6)])) for o in (plain.order, order)]
    assert held[0] == held[1]

  def columns_read(batches: pipeline.Batches) -> int:
    shapes = [batches.batch(step) for step in range(24)]
    return sum(b.prompt.size + b.response.size for b in shapes if isinstance(b, Sequences))

  assert columns_read(grouped) < 0.85 * columns_read(plain)


def test_a_process_has_its_part_of_packed_and_narrow_batches():
  """As wide as the whole batch, packed as it is."""
  columns, places = _ragged(24, BUCKETS), np.array([1, 2, 5])
  whole = pipeline.batches(columns, 6, seed=3, window=2, packer=Packer())
  part = pipeline.batches(columns, 6, seed=3, places=places, window=2, packer=Packer())
  for step in range(5):
    own: Any = part.batch(step)
    both: Any = whole.batch(step)
    np.testing.assert_array_equal(own.response, both.response[places])
    np.testing.assert_array_equal(own.packing.row, both.packing.row[places])
    np.testing.assert_array_equal(own.packing.start, both.packing.start[places])
    assert own.packing.rows == both.packing.rows and own.packing.records == 6


def test_groups_of_rows_have_little_padding():
  """Where there are as many kinds of rows as groups, each kind is alone."""
  kinds = np.array([[1, 8], [8, 1], [1, 1], [8, 8]])
  sizes = np.random.default_rng(0).permutation(np.repeat(kinds, 5, axis=0))
  groups = pipeline.by_size(sizes, 4)
  assert sorted(np.concatenate(groups)) == list(range(20))
  assert all(len(group) == 5 and len(np.unique(sizes[group], axis=0)) == 1 for group in groups)
