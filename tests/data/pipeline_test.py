"""Batches hold what records say, padded where the layout says, in an order fixed by the seed."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from rlhf_jax.common.errors import DataError
from rlhf_jax.common.types import Pairs, Prompts, Sequences
from rlhf_jax.data import pipeline, tokenizers
from rlhf_jax.data.config import DataConfig
from rlhf_jax.feedback.records import Comparison, Demonstration, Prompt

CONFIG = DataConfig(prompt_length=4, response_length=4)
WORDS = 'a b c d e f g h'
WORD = tokenizers.train('word', [WORDS], 100)
PAD, BOS, EOS = 0, 1, 2


def _ids(text: str) -> list[int]:
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


def test_pairs_have_the_chosen_response_first_and_the_prompt_twice():
  pair = Comparison('h', 'a b', 'c', preference=0.75, margin=2.0)
  batch = _take(pipeline.encode_comparisons([pair, pair], WORD, CONFIG), 1)
  assert isinstance(batch, Pairs)
  assert batch.sequences.response.tolist() == [
    [[*_ids('a b'), EOS, PAD], [*_ids('c'), EOS, PAD, PAD]]
  ]
  np.testing.assert_array_equal(batch.sequences.prompt[:, 0], batch.sequences.prompt[:, 1])
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
