"""What the model's config refuses, and the defaults it fills in."""

import re
from typing import Any

import pytest

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.models.config import ModelConfig
from tests.models.architectures import ARCHITECTURES, make_config


def test_the_defaults_and_every_architecture_are_valid() -> None:
  """Nothing that the tests run is refused."""
  ModelConfig().validate('model')
  for name in ARCHITECTURES:
    make_config(name)


@pytest.mark.parametrize(
  ('changes', 'field', 'expected'),
  [
    (dict(vocab_size=-1), 'vocab_size', 'a positive number, or 0'),
    (dict(vocab_multiple=0), 'vocab_multiple', 'a positive'),
    (dict(width=0), 'width', 'a positive'),
    (dict(layers=-2), 'layers', 'a positive'),
    (dict(heads=3), 'heads', 'a divisor of model.width=64'),
    (dict(kv_heads=3), 'kv_heads', 'a divisor of model.heads=4'),
    (dict(kv_heads=0), 'kv_heads', 'a positive'),
    (dict(head_dim=7), 'rotary_fraction', 'an even number of the 7 entries'),
    (dict(window=0), 'window', 'a positive'),
    (dict(window=-4), 'window', 'a positive'),
    (dict(window=4, window_pattern=''), 'window_pattern', "letters 'L'"),
    (dict(window=4, window_pattern='LX'), 'window_pattern', "letters 'L'"),
    (dict(window_pattern='LG'), 'window_pattern', "'L' without model.window"),
    (dict(rotary_fraction=0.0), 'rotary_fraction', 'above 0 and at most 1'),
    (dict(rotary_fraction=1.5), 'rotary_fraction', 'above 0 and at most 1'),
    (dict(rotary_fraction=0.2), 'rotary_fraction', 'even number'),
    (dict(rotary_fraction=0.05), 'rotary_fraction', 'even number'),
    (dict(rotary_theta=0.0), 'rotary_theta', 'a positive'),
    (dict(rotary_local_theta=10.0), 'rotary_local_theta', 'None without model.window'),
    (dict(rotary_scaling='yarn'), 'rotary_scaling', 'one of none, linear, llama3'),
    (dict(rotary_scaling='linear', rotary_scaling_factor=0.5), 'rotary_scaling_factor', 'at least'),
    (dict(rotary_scaling_factor=2.0), 'rotary_scaling_factor', '1.0 with model.rotary_scaling'),
    (
      dict(rotary_scaling='llama3', rotary_low_factor=4.0),
      'rotary_high_factor',
      'more than model.rotary_low_factor',
    ),
    (dict(attention_softcap=0.0), 'attention_softcap', 'a positive'),
    (dict(logit_softcap=-1.0), 'logit_softcap', 'a positive'),
    (dict(query_scale=0.0), 'query_scale', 'a positive'),
    (dict(init_std=float('nan')), 'init_std', 'a positive finite'),
    (dict(norm='batchnorm'), 'norm', 'one of rmsnorm, layernorm'),
    (dict(norm_placement='middle'), 'norm_placement', 'one of pre, post, sandwich'),
    (dict(norm_placement='post', parallel_residual=True), 'parallel_residual', 'False with'),
    (dict(activation='relu'), 'activation', 'one of silu'),
    (dict(positions='alibi'), 'positions', 'one of rotary, learned'),
    (dict(dtype='float16'), 'dtype', 'one of float32, bfloat16'),
    (dict(remat='some'), 'remat', 'one of none, dots, full'),
  ],
)
def test_refuses_what_cannot_work(changes: dict[str, Any], field: str, expected: str) -> None:
  """The message names the field below the given path, its value, and what was expected."""
  with pytest.raises(ConfigError) as caught:
    ModelConfig(**changes).validate('model')
  assert caught.value.field == f'model.{field}'
  value = getattr(ModelConfig(**changes), field)
  assert re.match(re.escape(f'--config.model.{field}={value!r}: expected '), str(caught.value))
  assert expected in str(caught.value)


def test_learned_positions_need_no_even_heads() -> None:
  """What only rotation needs is not asked of a model without it."""
  ModelConfig(positions='learned', head_dim=7).validate('model')


def test_the_pattern_of_windows_is_repeated_to_the_depth() -> None:
  """Gemma 3's pattern on 8 layers, Mistral's, and none."""
  gemma = ModelConfig(layers=8, window=4, window_pattern='LLLLLG')
  assert gemma.is_local() == (True,) * 5 + (False,) + (True,) * 2
  assert ModelConfig(window=4).is_local() == (True, True)
  assert ModelConfig().is_local() == (False, False)


def test_the_vocabulary_comes_from_the_tokenizer() -> None:
  """0 takes the tokenizer's size; more rows than ids are fine, fewer are refused."""
  assert ModelConfig().with_vocabulary(83).vocab_size == 83
  assert ModelConfig(vocab_size=100).with_vocabulary(83).vocab_size == 100
  with pytest.raises(ConfigError, match=r'model\.vocab_size=50: expected at least 83'):
    ModelConfig(vocab_size=50).with_vocabulary(83)
  assert ModelConfig(vocab_size=83, vocab_multiple=8).padded_vocab_size == 88
  assert ModelConfig(vocab_size=88, vocab_multiple=8).padded_vocab_size == 88
