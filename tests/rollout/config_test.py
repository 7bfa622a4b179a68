"""Settings of rewards that cannot work are named."""

from typing import Any

import pytest

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.rollout.config import RewardConfig, RolloutConfig, ServerConfig


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
    ({'engine': 'remote'}, 'rollout.engine', "'http'"),
    ({'engine': 'http'}, 'rollout.server.url', 'a URL'),
    ({'server': ServerConfig(url='http://a:1')}, 'rollout.server.url', "engine='http'"),
    ({'server': ServerConfig(retries=1)}, 'rollout.server.retries', 'does not read it'),
    ({'server': ServerConfig(dialect='sglang', model='m')}, 'rollout.server.model', 'has one'),
    ({'prompt_buckets': 0}, 'rollout.prompt_buckets', '>= 1'),
    ({'sampling_tensor': -1}, 'rollout.sampling_tensor', '0 for the mesh'),
    (
      {'engine': 'http', 'server': ServerConfig(url='http://a:1'), 'sampling_tensor': 2},
      'rollout.sampling_tensor',
      "0 with rollout.engine='http'",
    ),
    ({'old_logprobs': 'policy'}, 'rollout.old_logprobs', "'trainer', 'sampler'"),
    (
      {'engine': 'http', 'server': ServerConfig(url='http://a:1'), 'old_logprobs': 'sampler'},
      'rollout.old_logprobs',
      "'trainer' with rollout.engine='http'",
    ),
    (
      {'engine': 'http', 'server': ServerConfig(url='http://a:1'), 'prompt_buckets': 2},
      'rollout.prompt_buckets',
      'without padding',
    ),
    ({'server': ServerConfig(dialect='tgi')}, 'rollout.server.dialect', 'sglang'),
    ({'server': ServerConfig(timeout=0.0)}, 'rollout.server.timeout', 'above 0'),
    ({'server': ServerConfig(retries=-1)}, 'rollout.server.retries', '>= 0'),
    ({'server': ServerConfig(backoff=-1.0)}, 'rollout.server.backoff', '0 or above'),
    ({'server': ServerConfig(concurrency=0)}, 'rollout.server.concurrency', '>= 1'),
    ({'server': ServerConfig(dtype='int8')}, 'rollout.server.dtype', 'bfloat16'),
    ({'missing_stop': 'subtract'}, 'rollout.missing_stop_value', 'never stop'),
    ({'missing_stop_value': -2.0}, 'rollout.missing_stop_value', "with missing_stop 'none'"),
    ({'score_truncation_after': 16}, 'rollout.score_truncation_after', 'Nothing reads it there'),
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


def test_a_threshold_may_lie_on_its_gate() -> None:
  """All above the gate is then good enough."""
  RolloutConfig(rewards=(RewardConfig(gate_below=0.5, clip_above=0.5),)).validate('rollout')


@pytest.mark.parametrize(
  ('rewards', 'field'),
  [
    ((RewardConfig(), RewardConfig()), 'rewards[1].source'),
    ((RewardConfig(source='task', init='runs/rm'),), 'rewards[0].init'),
    ((RewardConfig(files=('words.txt',)),), 'rewards[0].files'),
    ((RewardConfig(gate_only=True),), 'rewards[0].gate_only'),
    ((RewardConfig(gate_only=True, gate_below=0.0),), 'rewards'),
    ((RewardConfig(gate_below=0.5, clip_above=0.4),), 'rewards[0].clip_above'),
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


@pytest.mark.parametrize(
  ('url', 'good'),
  [
    ('http://host:8000', True),
    ('https://host', True),
    ('http://10.0.0.1:30000/behind/a/proxy/', True),
    ('http://[::1]:8000', True),
    ('host:8000', False),
    ('http://', False),
    ('http://host:port', False),
    ('http://host:8000/v1', False),
    ('http://host:8000/v1/', False),
    ('http://host/?key=1', False),
    ('http://user:word@host', False),
    ('ftp://host', False),
    ('', False),
  ],
)
def test_a_server_is_named_by_its_root(url: str, good: bool) -> None:
  """Paths go below it; a password in it would be written into the run directory."""
  config = RolloutConfig(engine='http', server=ServerConfig(url=url))
  if good:
    config.validate('rollout')
    return
  with pytest.raises(ConfigError) as caught:
    config.validate('rollout')
  assert caught.value.field == 'rollout.server.url'
