"""Every impossible data config is refused by the name of the field."""

import dataclasses

import pytest

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.data.config import DataConfig, ReviewsConfig, TFDSConfig
from rlhf_jax.feedback.labelling import LabelConfig


@pytest.mark.parametrize(
  'config',
  [
    DataConfig(),
    DataConfig(source='jsonl', path='x.jsonl', tokenizer='byte', vocab_size=260),
    DataConfig(source='tfds:imdb_reviews', tokenizer='some/folder', vocab_size=1),
    DataConfig(held_out=0.0),
    DataConfig(held_out=500.0),
    DataConfig(convert='rankings_to_comparisons', responses='preferred'),
    DataConfig(reviews=ReviewsConfig(rating_noise=0.0, ranking_size=2)),
  ],
)
def test_possible_configs_pass(config):
  config.validate('data')


JSONL = {'source': 'jsonl', 'path': 'x.jsonl'}


@pytest.mark.parametrize(
  'changes, field',
  [
    ({'source': 'parquet'}, 'source'),
    ({'source': 'tfds:'}, 'source'),
    ({'source': 'jsonl'}, 'path'),
    ({'path': 'x.jsonl'}, 'path'),
    ({'held_out_path': 'x.jsonl'}, 'held_out_path'),
    ({'source': 'tfds:x', 'held_out_path': 'x.jsonl'}, 'held_out_path'),
    ({'held_out': -0.1}, 'held_out'),
    ({'held_out': 1.5}, 'held_out'),
    ({'held_out': float('nan')}, 'held_out'),
    ({'held_out': float('inf')}, 'held_out'),
    ({'on_error': 'skip'}, 'on_error'),
    ({'responses': 'rejected'}, 'responses'),
    ({'convert': 'ratings'}, 'convert'),
    ({'prompt_length': 1}, 'prompt_length'),
    ({'response_length': 0}, 'response_length'),
    ({'truncation': 'middle'}, 'truncation'),
    ({'chat_template': 'plain'}, 'chat_template'),
    ({'tokenizer': ''}, 'tokenizer'),
    ({'tokenizer': 'byte'}, 'tokenizer'),
    ({**JSONL, 'tokenizer': 'byte', 'vocab_size': 259}, 'vocab_size'),
    ({**JSONL, 'vocab_size': 4}, 'vocab_size'),
    ({'reviews': ReviewsConfig(comparisons=0)}, 'reviews.comparisons'),
    ({'reviews': ReviewsConfig(ratings=0)}, 'reviews.ratings'),
    ({'reviews': ReviewsConfig(rankings=0)}, 'reviews.rankings'),
    ({'reviews': ReviewsConfig(step_ratings=-1)}, 'reviews.step_ratings'),
    ({'reviews': ReviewsConfig(rating_noise=-0.1)}, 'reviews.rating_noise'),
    ({'reviews': ReviewsConfig(rating_noise=float('inf'))}, 'reviews.rating_noise'),
    ({'reviews': ReviewsConfig(rating_noise=float('nan'))}, 'reviews.rating_noise'),
    ({'reviews': ReviewsConfig(ranking_size=1)}, 'reviews.ranking_size'),
    ({'reviews': ReviewsConfig(ranking_size=33)}, 'reviews.ranking_size'),
    ({'reviews': ReviewsConfig(seed=-1)}, 'reviews.seed'),
    ({'reviews': ReviewsConfig(labels=LabelConfig(flip_rate=0.7))}, 'reviews.labels.flip_rate'),
    ({'tfds': TFDSConfig(split='')}, 'tfds.split'),
    ({'tfds': TFDSConfig(response_field=None)}, 'tfds.response_field'),
  ],
)
def test_an_impossible_value_is_refused_by_name(changes, field):
  config = dataclasses.replace(DataConfig(), **changes)
  with pytest.raises(ConfigError, match=rf'--config\.data\.{field}=.*expected') as caught:
    config.validate('data')
  assert caught.value.field == f'data.{field}'


def test_an_unknown_converter_is_answered_with_the_known_ones():
  with pytest.raises(ConfigError, match='comparisons_to_ratings, .*, step_ratings_to_ratings_last'):
    DataConfig(convert='dpo').validate('data')
