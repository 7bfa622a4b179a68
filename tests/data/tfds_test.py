"""tensorflow-datasets are read from array_record files, without TensorFlow."""

import sys

import numpy as np
import pytest

from rlhf_jax.common.errors import DataError
from rlhf_jax.data import sources
from rlhf_jax.data.config import DataConfig, TFDSConfig
from rlhf_jax.feedback.records import Demonstration, Prompt

ROWS = {
  'train': [(f'question {i}', f'answer {i} ☺') for i in range(6)],
  'test': [('last', 'so'), ('empty', ' ')],
}


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  """A small data set, written by tensorflow-datasets itself."""
  tfds = pytest.importorskip('tensorflow_datasets')

  class Answers(tfds.core.GeneratorBasedBuilder):  # type: ignore[name-defined]
    """Questions and answers."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      features = {'question': tfds.features.Text(), 'answer': tfds.features.Text()}
      features['number'] = tfds.features.Scalar(np.int64)
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(split) for split in ROWS}

    def _generate_examples(self, split):
      for number, (question, answer) in enumerate(ROWS[split]):
        yield number, {'question': question, 'answer': answer, 'number': number}

  Answers.__module__ = 'answers'  # it looks for its source, and tests lie in no package
  folder = str(tmp_path_factory.mktemp('tfds'))
  Answers(data_dir=folder, file_format='array_record').download_and_prepare()
  return folder


def _load(data_dir, name='answers', quarantine=None, held_out=0.0, on_error='strict', **fields):
  config = DataConfig(
    source=f'tfds:{name}',
    path=data_dir,
    held_out=held_out,
    on_error=on_error,
    tfds=TFDSConfig(**{'prompt_field': 'question', 'response_field': 'answer', **fields}),
  )
  config.validate('data')
  return sources.load(config, quarantine)


def test_demonstrations_are_read_without_tensorflow(data_dir):
  feedback = _load(data_dir)
  assert set(feedback.train.demonstrations) == {Demonstration(*row) for row in ROWS['train']}
  assert {prompt.text for prompt in feedback.train.prompts} == {row[0] for row in ROWS['train']}
  assert 'tensorflow' not in sys.modules


def test_texts_without_prompts_and_prompts_without_texts(data_dir):
  texts = _load(data_dir, prompt_field=None).train
  assert {x.response for x in texts.demonstrations} == {row[1] for row in ROWS['train']}
  assert texts.prompts == (Prompt(''),)
  prompts = _load(data_dir, response_field=None).train
  assert set(prompts.prompts) == {Prompt(row[0]) for row in ROWS['train']}
  assert prompts.demonstrations == ()


def test_splits_can_be_sliced_and_held_out(data_dir):
  feedback = _load(data_dir, split='train[:4]', held_out_split='train[4:]')
  assert len(feedback.train.demonstrations) == 4
  assert len(feedback.held_out.demonstrations) == 2


def test_a_bad_record_is_named_or_quarantined(data_dir, tmp_path):
  with pytest.raises(DataError, match=r"tfds:answers\[test\]:\d: field 'response': empty response"):
    _load(data_dir, split='test')
  side = tmp_path / 'side.jsonl'
  feedback = _load(data_dir, split='test', on_error='quarantine', quarantine=side)
  assert feedback.quarantined == 1 and feedback.train.demonstrations == (
    Demonstration('last', 'so'),
  )


def test_what_cannot_be_opened_is_an_error_that_names_it(data_dir):
  with pytest.raises(DataError, match="field 'text' is not among .*'answer', 'number', 'question'"):
    _load(data_dir, response_field='text')
  with pytest.raises(DataError, match="field 'number': expected text"):
    _load(data_dir, response_field='number')
  with pytest.raises(DataError, match="tfds:answers: split 'dev' .* cannot be opened"):
    _load(data_dir, split='dev')
  with pytest.raises(DataError, match='tfds:no_such_set: split .* Check the name'):
    _load(data_dir, name='no_such_set')
