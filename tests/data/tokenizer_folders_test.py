"""Folders of other tools are read for what they say, and refused for what they lack."""

import json

import pytest

from rlhf_jax.common.errors import ConfigError, DataError
from rlhf_jax.data import tokenizers
from rlhf_jax.models.config import ModelConfig
from tests.data import folders


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'eos_token': {'id': 3}}, "eos_token={'id': 3}: expected a text"),
    ({'pad_token': ['x']}, r"pad_token=\['x'\]: expected a text"),
    ({'chat_template': [{'x': 1}]}, "chat_template=.*expected objects with 'name' and 'template'"),
    ({'chat_template': 5}, 'chat_template=5: expected a text'),
    ({'chat_template': {'default': None, 'tools': 'x'}, 'eos_token': 1}, 'eos_token=1: expected'),
  ],
)
def test_what_makes_no_sense_is_named(tmp_path, changes, message):
  """The file and the field, whatever stands there."""
  folders.gpt2(tmp_path)
  config = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  (tmp_path / 'chat_template.jinja').unlink(missing_ok=True)
  folders.write(tmp_path, 'tokenizer_config.json', {**config, **changes})
  with pytest.raises(DataError, match=f'tokenizer_config.json: {message}'):
    tokenizers.load(tmp_path)


def test_padding_may_be_the_end_of_sequence(tmp_path):
  theirs = folders.gpt2(tmp_path)
  loaded = tokenizers.load(tmp_path)
  assert theirs.pad_token is None
  assert loaded.pad_id == loaded.bos_id == loaded.eos_id == theirs.eos_token_id


@pytest.mark.parametrize('make', [folders.gpt2, folders.llama])
def test_texts_have_the_tokens_that_transformers_gives_them(tmp_path, make):
  theirs, texts = make(tmp_path), [*folders.TEXTS, ' a  b\n', 'x']
  loaded = tokenizers.load(tmp_path)
  assert loaded.encode_batch(texts) == theirs(texts, add_special_tokens=False)['input_ids']
  assert loaded.vocab_size == len(theirs)


def test_texts_begin_as_transformers_begins_them(tmp_path):
  """GPT-2 has a token for the beginning and does not use it; Llama does; the folder may say so."""
  theirs = folders.gpt2(tmp_path / 'gpt2')
  found = tokenizers.load(tmp_path / 'gpt2')
  assert found.bos_id is not None and found.start == []
  ids = found.start + found.encode_batch(['Be brief.'])[0]
  assert ids == theirs('Be brief.')['input_ids']
  saved = json.loads((tmp_path / 'gpt2' / 'tokenizer_config.json').read_text())
  (tmp_path / 'gpt2' / 'tokenizer_config.json').write_text(
    json.dumps({**saved, 'add_bos_token': True})
  )
  told = tokenizers.load(tmp_path / 'gpt2')
  assert told.start == [told.bos_id] and told.fingerprint != found.fingerprint
  for one in (found, told):
    one.save(tmp_path / 'again')
    again = tokenizers.load(tmp_path / 'again')
    assert again.start == one.start and again.fingerprint == one.fingerprint


@pytest.mark.parametrize('make', [folders.gpt2, folders.llama])
def test_a_saved_folder_comes_back_with_template_and_stops(tmp_path, make):
  """And transformers reads it: the same ids, special tokens and dialogues."""
  import transformers

  theirs = make(tmp_path / 'theirs')
  loaded = tokenizers.load(tmp_path / 'theirs')
  loaded.save(tmp_path / 'ours')
  again = tokenizers.load(tmp_path / 'ours')
  assert again.identity == loaded.identity and again.stops == loaded.stops
  assert again.template == loaded.template == theirs.chat_template
  read = transformers.AutoTokenizer.from_pretrained(str(tmp_path / 'ours'))
  said = [{'role': 'user', 'content': 'Hello'}]
  assert read.apply_chat_template(said, tokenize=False) == theirs.apply_chat_template(
    said, tokenize=False
  )
  assert (read.bos_token, read.eos_token) == (theirs.bos_token, theirs.eos_token)


def test_stop_tokens_are_those_of_the_template_and_the_generation_config(tmp_path):
  theirs = folders.gpt2(tmp_path)
  end = theirs.convert_tokens_to_ids('<|im_end|>')
  assert tokenizers.load(tmp_path).stop_ids == (theirs.eos_token_id, end)
  folders.write(tmp_path, 'generation_config.json', {'eos_token_id': [theirs.eos_token_id, 7, end]})
  assert tokenizers.load(tmp_path).stops == (7, end)
  folders.write(tmp_path, 'generation_config.json', {'eos_token_id': 7})
  assert tokenizers.load(tmp_path).stops == (7, end)
  (tmp_path / 'generation_config.json').unlink()
  folders.write(tmp_path, 'config.json', {'eos_token_id': [theirs.eos_token_id, 7, 9999]})
  assert tokenizers.load(tmp_path).stops == (7, end)  # a class's default may be beyond the ids
  folders.write(tmp_path, 'config.json', {'text_config': {'eos_token_id': 7}})
  assert tokenizers.load(tmp_path).stops == (7, end)
  for bad, message in (
    ([9999], '9999 is not in the vocabulary'),
    ('x', 'expected an id or a list'),
  ):
    folders.write(tmp_path, 'generation_config.json', {'eos_token_id': bad})
    with pytest.raises(DataError, match=message):
      tokenizers.load(tmp_path)


def test_the_end_of_a_turn_may_be_the_end_of_sequence(tmp_path):
  folders.llama(tmp_path)
  assert tokenizers.load(tmp_path).stops == ()


def test_a_stop_token_is_no_part_of_a_response_as_text(tmp_path):
  folders.gpt2(tmp_path)
  loaded = tokenizers.load(tmp_path)
  (ids,) = loaded.encode_batch(['a<|im_end|>b<|im_end|>'])
  assert loaded.decode(ids) == 'a<|im_end|>b'


def test_the_template_may_be_in_any_of_four_places(tmp_path):
  folders.gpt2(tmp_path, None)
  assert tokenizers.load(tmp_path).template is None
  for value in ('A', [{'name': 'rag', 'template': 'R'}, {'name': 'default', 'template': 'A'}]):
    folders.change(tmp_path, 'tokenizer_config.json', chat_template=value)
    assert tokenizers.load(tmp_path).template == 'A'
  folders.write(tmp_path, 'chat_template.json', {'chat_template': 'B'})
  assert tokenizers.load(tmp_path).template == 'B'
  (tmp_path / 'chat_template.jinja').write_text('C')
  assert tokenizers.load(tmp_path).template == 'C'


def test_several_templates_without_a_default_are_an_error(tmp_path):
  folders.gpt2(tmp_path, None)
  folders.change(
    tmp_path, 'tokenizer_config.json', chat_template=[{'name': 'rag', 'template': 'R'}]
  )
  with pytest.raises(DataError, match=r"\['rag'\], none is 'default'.*data.chat_template=FILE"):
    tokenizers.load(tmp_path)


def test_special_tokens_may_be_named_in_the_older_file(tmp_path):
  folders.llama(tmp_path)
  folders.change(tmp_path, 'tokenizer_config.json', bos_token=None, eos_token=None)
  folders.write(
    tmp_path, 'special_tokens_map.json', {'bos_token': '<s>', 'eos_token': {'content': '</s>'}}
  )
  loaded = tokenizers.load(tmp_path)
  assert (loaded.bos_id, loaded.eos_id) == (1, 2)


def test_a_folder_as_old_as_gpt2s_names_no_tokens_and_its_class_knows_them(tmp_path):
  theirs = folders.gpt2(tmp_path, None)
  folders.write(tmp_path, 'tokenizer_config.json', {'model_max_length': 1024})
  folders.write(tmp_path, 'config.json', {'model_type': 'gpt2'})
  loaded = tokenizers.load(tmp_path)
  assert loaded.bos_id == loaded.eos_id == theirs.eos_token_id


def test_a_tokenizer_without_an_end_is_an_error(tmp_path):
  folders.word_piece(tmp_path)
  with pytest.raises(DataError, match='end-of-sequence token is None.*name eos_token in'):
    tokenizers.load(tmp_path)


@pytest.mark.parametrize('name', ['pad', 'bos'])
def test_a_special_token_without_an_id_is_an_error(tmp_path, name):
  """Other tools add it as a new id, for which a checkpoint has no embedding."""
  folders.gpt2(tmp_path)
  folders.change(tmp_path, 'tokenizer_config.json', **{f'{name}_token': '[NEW]'})
  with pytest.raises(DataError, match=rf"{name}_token is '\[NEW\]', which is not in the vocab"):
    tokenizers.load(tmp_path)


CODE = 'import pathlib\npathlib.Path(__file__).with_name("ran").touch()\n'


@pytest.mark.parametrize('converted', [True, False])
@pytest.mark.parametrize('auto', [{'AutoTokenizer': ['own.X', None]}, ['own.X', None]])
def test_a_tokenizer_that_is_code_is_refused(tmp_path, auto, converted):
  """With a tokenizer.json too: what its own class makes of texts may be something else."""
  if converted:
    folders.gpt2(tmp_path)
    folders.change(tmp_path, 'tokenizer_config.json', auto_map=auto)
  else:
    folders.write(tmp_path, 'tokenizer_config.json', {'auto_map': auto})
  (tmp_path / 'own.py').write_text(CODE)
  with pytest.raises(DataError, match='code of its own .*own.X.* is not run.*without auto_map'):
    tokenizers.load(tmp_path)
  assert not (tmp_path / 'ran').exists()


def test_code_of_other_parts_is_not_run(tmp_path, monkeypatch):
  """transformers, which knows the special tokens of old folders, is not to ask for leave either."""
  folders.gpt2(tmp_path, None)
  folders.write(tmp_path, 'tokenizer_config.json', {'auto_map': {'AutoProcessor': 'own.X'}})
  auto = {'AutoConfig': 'own.X', 'AutoTokenizer': ['own.X', None]}
  folders.write(tmp_path, 'config.json', {'model_type': 'own', 'auto_map': auto})
  (tmp_path / 'own.py').write_text(CODE)
  monkeypatch.setattr('builtins.input', lambda _: 'y')
  with pytest.raises(DataError, match='end-of-sequence token is None'):
    tokenizers.load(tmp_path)
  assert not (tmp_path / 'ran').exists()


def test_a_vocabulary_larger_than_the_embedding_is_an_error(tmp_path):
  folders.gpt2(tmp_path)
  size = tokenizers.load(tmp_path).vocab_size
  assert ModelConfig(vocab_size=0).with_vocabulary(size).vocab_size == size
  assert ModelConfig(vocab_size=size + 5).with_vocabulary(size).vocab_size == size + 5
  with pytest.raises(ConfigError, match=f'model.vocab_size=256: expected at least {size}'):
    ModelConfig(vocab_size=256).with_vocabulary(size)
