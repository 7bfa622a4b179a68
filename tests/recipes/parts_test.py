"""What a stage takes from the one it starts from, and what it may not ask of it."""

import dataclasses
from typing import Any

import jax
import pytest

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.recipes.parents import inherit, judge_model
from rlhf_jax.recipes.parts import check_tokens, load_parts
from rlhf_jax.runs import Run
from tests import tiny

PARENT = ModelConfig(vocab_size=40, width=32, layers=3)


def test_a_stage_has_its_parents_decoder_computed_as_it_asks():
  asked = ModelConfig(dtype='bfloat16', remat='full', scan_layers=True)
  expected = dataclasses.replace(PARENT, dtype='bfloat16', remat='full', scan_layers=True)
  assert inherit(asked, PARENT) == expected
  assert inherit(ModelConfig(), PARENT) == PARENT
  assert inherit(ModelConfig(width=32), PARENT) == PARENT
  # What is said is taken, where it is what a decoder without a start has, too.
  plain = ModelConfig(dtype='float32', remat='none', scan_layers=False, vocab_chunk=0)
  found = inherit(plain, dataclasses.replace(expected, vocab_chunk=8))
  assert found == dataclasses.replace(
    PARENT, dtype='float32', remat='none', scan_layers=False, vocab_chunk=0
  )
  assert (found.compute_dtype, found.remat_policy) == ('float32', 'none')
  assert not found.scanned and found.ids_at_once is None


def test_another_architecture_than_the_parents_is_refused():
  with pytest.raises(ConfigError, match=r'model.width=128.*expected 32'):
    inherit(ModelConfig(width=128), PARENT)


def test_a_reward_model_is_computed_as_the_policy():
  """So is a value trunk that starts from it; what the stage leaves at its default stays its own."""
  policy = ModelConfig(dtype='bfloat16', remat='full', vocab_chunk=8, attention='cudnn', width=8)
  asked: dict[str, Any] = dict(dtype='bfloat16', remat='full', vocab_chunk=8, attention='cudnn')
  expected = dataclasses.replace(PARENT, **asked, scan_layers=False)
  assert judge_model(policy, PARENT) == expected
  half = dataclasses.replace(PARENT, dtype='bfloat16', scan_layers=True)
  assert judge_model(ModelConfig(), half) == dataclasses.replace(half, scan_layers=False)
  assert judge_model(ModelConfig(dtype='float32'), half).compute_dtype == 'float32'


def test_attention_that_a_reward_model_cannot_have_is_found_at_once(parents, monkeypatch):
  """Before anything is compiled; the policy itself could have it."""

  class Capped(Run):
    @property
    def model(self):
      return dataclasses.replace(super().model, attention_softcap=5.0)

  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  config = tiny.make_config('rloo', parents)
  config.model = dataclasses.replace(tiny.MODEL, attention='cudnn', dtype='bfloat16')
  runs = {'policy': Run(parents / 'sft'), 'reward_model': Capped(parents / 'reward_model')}
  feedback = tiny.feedback_of(config.data.response_length)
  with tiny.devices(1):
    load_parts(config, {**runs, 'reward_model': Run(parents / 'reward_model')}, feedback)
    with pytest.raises(ConfigError, match='model.attention.*no soft-cap'):
      load_parts(config, runs, feedback)


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
