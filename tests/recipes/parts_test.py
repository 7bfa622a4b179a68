"""What a stage takes from the one it starts from, and what it may not ask of it."""

import dataclasses

import pytest

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.recipes.parts import check_tokens, inherit
from tests import tiny

PARENT = ModelConfig(vocab_size=40, width=32, layers=3)


def test_a_stage_has_its_parents_decoder_computed_as_it_asks():
  asked = ModelConfig(dtype='bfloat16', remat='full', scan_layers=True)
  expected = dataclasses.replace(PARENT, dtype='bfloat16', remat='full', scan_layers=True)
  assert inherit(asked, PARENT) == expected
  assert inherit(ModelConfig(), PARENT) == PARENT
  assert inherit(ModelConfig(width=32), PARENT) == PARENT


def test_another_architecture_than_the_parents_is_refused():
  with pytest.raises(ConfigError, match=r'model.width=128.*expected 32'):
    inherit(ModelConfig(width=128), PARENT)


@pytest.mark.parametrize('field', ['generation.stop_tokens', 'rollout.score_truncation_token'])
def test_token_ids_beyond_the_vocabulary_are_refused(field):
  config = tiny.make_config('ppo')
  config.generation.stop_tokens = (3,)
  check_tokens(config, PARENT)
  if field == 'generation.stop_tokens':
    config.generation.stop_tokens = (3, 40)
  else:
    config.rollout.score_truncation_token = 40
  with pytest.raises(ConfigError, match=field):
    check_tokens(config, PARENT)
