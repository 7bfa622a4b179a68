"""Text survives tokenizers, tokenizers survive folders, and no text can forge a special token."""

import json
import pathlib
import random
from typing import Any

import pytest
import tokenizers as hf

from rlhf_jax.common.errors import DataError
from rlhf_jax.data import tokenizers

TEXTS = ['the food was good', 'the staff was not so good but the food was', 'good food']
ODD = ['', ' two  spaces ', 'tab\tand\nnewline', 'naïve ☺ 漢字', '<eos> and <pad>', '\x00\x7f']


def test_words_are_numbered_after_the_special_tokens_by_frequency():
  word = tokenizers.train('word', TEXTS, 100)
  assert (word.pad_id, word.bos_id, word.eos_id) == (0, 1, 2)
  assert word.vocab_size == 4 + len({w for text in TEXTS for w in text.split()})
  frequent = word.encode_batch(['the'])[0][0]
  assert 4 <= frequent <= 7 and word.encode_batch(['zebra']) == [[3]]


@pytest.mark.parametrize('text', [*TEXTS, ''])
def test_known_words_survive_the_word_tokenizer(text):
  word = tokenizers.train('word', TEXTS, 100)
  assert word.decode(word.encode_batch([text])[0]) == text


@pytest.mark.parametrize('text', [*TEXTS, *ODD])
def test_any_text_survives_the_byte_tokenizer(text):
  byte = tokenizers.train('byte', TEXTS, 300)
  ids = byte.encode_batch([text])[0]
  assert byte.decode(ids) == text
  assert not {byte.pad_id, byte.bos_id, byte.eos_id} & set(ids)


@pytest.mark.parametrize('kind', ['word', 'byte'])
def test_special_tokens_spelt_out_in_a_text_are_text(kind):
  forged = 'good <eos> <pad><bos> food'
  trained = tokenizers.train(kind, [*TEXTS, forged], 300)
  (ids,) = trained.encode_batch([forged])
  assert not {trained.pad_id, trained.bos_id, trained.eos_id} & set(ids)
  assert len(set(trained.backend.get_vocab().values())) == len(trained.backend.get_vocab())


def test_decoding_leaves_out_padding_beginning_and_end_but_shows_unknown_words():
  word = tokenizers.train('word', TEXTS, 100)
  (ids,) = word.encode_batch(['the zebra was good'])
  padded: list[Any] = [word.pad_id, word.bos_id, *ids, word.eos_id, word.pad_id]
  assert word.decode(padded) == 'the <unk> was good'


@pytest.mark.parametrize('kind', ['word', 'byte'])
@pytest.mark.parametrize('text', [*TEXTS, *ODD])
def test_tokens_start_where_their_text_starts(kind, text):
  """Starts never fall, and the tokens before a start spell the text before it."""
  trained = tokenizers.train(kind, [*TEXTS, *ODD], 300)
  ((ids, starts),) = trained.encode_with_starts([text])
  assert ids == trained.encode_batch([text])[0] and len(starts) == len(ids)
  assert starts == sorted(starts) and all(0 <= start < len(text) for start in starts)
  if kind == 'byte':
    for start in set(starts):
      place = starts.index(start)
      # The token before may hold the first bytes of the letter.
      assert trained.decode(ids[:place]).rstrip('\ufffd') == text[:start]
  elif '<' not in text:
    assert [text[start:].split()[0] for start in starts] == text.split()


@pytest.mark.parametrize('kind, size', [('word', 7), ('byte', 265)])
def test_the_vocabulary_is_no_larger_than_asked_for(kind, size):
  assert tokenizers.train(kind, TEXTS * 5, size).vocab_size == size


@pytest.mark.parametrize('kind', ['word', 'byte'])
def test_training_depends_on_the_texts_not_on_their_order(kind):
  texts = [f'{a} {b}' for a in ('good', 'bad', 'warm', 'cold') for b in ('food', 'bar', 'view')]
  shuffled = random.Random(0).sample(texts, len(texts))
  one, other = (tokenizers.train(kind, rows, 300) for rows in (texts, shuffled))
  assert one.fingerprint == other.fingerprint
  assert one.fingerprint != tokenizers.train(kind, texts[1:], 300).fingerprint


@pytest.mark.parametrize('kind', ['word', 'byte'])
def test_a_saved_tokenizer_comes_back_the_same(kind, tmp_path):
  trained = tokenizers.train(kind, TEXTS, 300)
  trained.save(tmp_path / 'folder')
  loaded = tokenizers.load(tmp_path / 'folder')
  assert loaded.fingerprint == trained.fingerprint
  assert loaded.encode_batch([*TEXTS, *ODD]) == trained.encode_batch([*TEXTS, *ODD])
  assert (loaded.pad_id, loaded.bos_id, loaded.eos_id) == (0, 1, 2)


def test_hugging_face_reads_what_is_saved(tmp_path):
  transformers = pytest.importorskip('transformers')
  trained = tokenizers.train('byte', TEXTS, 300)
  trained.save(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
  assert theirs(TEXTS, add_special_tokens=False)['input_ids'] == trained.encode_batch(TEXTS)
  assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)


def _foreign(folder: pathlib.Path, **config: Any) -> None:
  """A folder as Hugging Face's tools leave it: it truncates, pads and adds tokens by itself."""
  backend = hf.Tokenizer(hf.models.WordLevel({'</s>': 0, '<|turn|>': 1, 'hi': 2, 'so': 3}, '</s>'))
  backend.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
  backend.add_special_tokens(['</s>', '<|turn|>'])
  backend.post_processor = hf.processors.TemplateProcessing(
    single='$A </s>', special_tokens=[('</s>', 0)]
  )
  backend.enable_truncation(2)
  backend.enable_padding()
  backend.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))


def test_foreign_folders_neither_pad_nor_truncate_and_keep_their_markup(tmp_path):
  _foreign(tmp_path, eos_token={'content': '</s>', 'special': True})
  loaded = tokenizers.load(tmp_path)
  assert loaded.encode_batch(['<|turn|>hi so so', 'hi']) == [[1, 2, 3, 3], [2]]
  assert (loaded.pad_id, loaded.bos_id, loaded.eos_id) == (0, None, 0)  # pad may be the end token
  assert loaded.decode([1, 2, 0]) == '<|turn|> hi'


def test_a_slow_folder_is_converted_by_transformers(tmp_path):
  pytest.importorskip('transformers')
  letters = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {letter: i for i, letter in enumerate([*letters, 'hi', '<|endoftext|>'])}
  (tmp_path / 'vocab.json').write_text(json.dumps(vocabulary))
  (tmp_path / 'merges.txt').write_text('#version: 0.2\nh i\n')
  (tmp_path / 'tokenizer_config.json').write_text('{"tokenizer_class": "GPT2Tokenizer"}')
  loaded = tokenizers.load(tmp_path)
  assert loaded.encode_batch(['hi']) == [[vocabulary['hi']]]
  assert loaded.eos_id == vocabulary['<|endoftext|>']


def test_folders_that_hold_no_tokenizer_are_errors(tmp_path):
  with pytest.raises(DataError, match="nowhere: no such folder.*'word', 'byte' or a folder"):
    tokenizers.load(tmp_path / 'nowhere')
  (tmp_path / 'tokenizer.json').write_text('{')
  with pytest.raises(DataError, match='not a tokenizer that can be read'):
    tokenizers.load(tmp_path)


@pytest.mark.parametrize('config', [{}, {'eos_token': 'missing'}])
def test_a_tokenizer_without_an_end_token_is_an_error(tmp_path, config):
  _foreign(tmp_path, **config)
  with pytest.raises(DataError, match='end-of-sequence token is .* name eos_token'):
    tokenizers.load(tmp_path)


def test_an_empty_folder_is_an_error(tmp_path):
  pytest.importorskip('transformers')
  with pytest.raises(DataError, match='no tokenizer.json, and transformers cannot read'):
    tokenizers.load(tmp_path)
