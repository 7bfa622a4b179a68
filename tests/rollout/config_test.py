"""Settings of rewards that cannot work are named."""

from typing import Any

import pytest

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.rollout.config import RewardConfig, RolloutConfig


@pytest.mark.parametrize('source', ['reward_model', 'task', 'a.py:f', 'some/where.py:_score_2'])
def test_sources_that_may_be(source: str) -> None:
  RewardConfig(source=source).validate('x')


@pytest.mark.parametrize(
  'source', ['', 'rm', 'a.py', 'a.py:', ':f', 'a:f', 'a.py:f()', 'a.py:1', 'reward_model ']
)
def test_sources_that_name_nothing(source: str) -> None:
  """Neither a reward model, nor the task, nor a file with the name of a function."""
  with pytest.raises(ConfigError, match="x.source=.*'FILE.py:NAME'"):
    RewardConfig(source=source).validate('x')


@pytest.mark.parametrize(
  ('settings', 'field', 'words'),
  [
    ({'rewards': ()}, 'rollout.rewards', 'at least one reward'),
    (
      {'rewards': (RewardConfig(), RewardConfig(weight=0.0))},
      'rollout.rewards[1].weight',
      'Leave it out',
    ),
    ({'rewards': (RewardConfig(source='x'),)}, 'rollout.rewards[0].source', 'FILE.py:NAME'),
    ({'missing_stop': 'drop'}, 'rollout.missing_stop', "'subtract'"),
    ({'missing_stop': 'subtract'}, 'rollout.missing_stop_value', 'never stop'),
  ],
)
def test_what_cannot_work_is_named(settings: dict[str, Any], field: str, words: str) -> None:
  """By the path it has on the command line."""
  with pytest.raises(ConfigError) as caught:
    RolloutConfig(**settings).validate('rollout')
  assert caught.value.field == field and words in str(caught.value)


def test_the_defaults_are_one_reward_model() -> None:
  config = RolloutConfig()
  config.validate('rollout')
  assert config.sources() == ('reward_model',)


@pytest.mark.parametrize(
  ('rewards', 'field'),
  [
    ((RewardConfig(), RewardConfig()), 'rewards[1].source'),
    ((RewardConfig(source='task', init='runs/rm'),), 'rewards[0].init'),
    ((RewardConfig(files=('words.txt',)),), 'rewards[0].files'),
    ((RewardConfig(gate_only=True),), 'rewards[0].gate_only'),
    ((RewardConfig(gate_only=True, gate_below=0.0),), 'rewards'),
  ],
)
def test_rewards_that_cannot_be_together(rewards: tuple[RewardConfig, ...], field: str) -> None:
  """The same one twice, settings of another source, and gates without anything behind them."""
  with pytest.raises(ConfigError) as caught:
    RolloutConfig(rewards=rewards).validate('rollout')
  assert caught.value.field == f'rollout.{field}'


def test_a_cut_begins_somewhere() -> None:
  """Positions count from 0."""
  with pytest.raises(ConfigError, match='score_truncation_after'):
    RolloutConfig(score_truncation_after=-1).validate('rollout')
