"""Configs within tuples: checked, written and read like any other."""

import dataclasses
import json
from typing import Any

import pytest

from rlhf_jax.common.errors import ConfigError, UserError
from rlhf_jax.config import ExperimentConfig, RewardModelInitConfig
from rlhf_jax.config_values import canonical_json, check_types, differences, from_dict, to_dict
from rlhf_jax.rollout.config import RewardConfig, RolloutConfig
from tests import tiny

REWARDS = (
  RewardConfig(weight=0.5, clip_above=2.0),
  RewardConfig(source='task', gate_below=-1.0),
  RewardConfig(source='lexicon.py:polite'),
)


def make_config(**changes: Any) -> ExperimentConfig:
  config = tiny.make_config('ppo', 'somewhere', rollout=RolloutConfig(rewards=REWARDS))
  config.reward_model = RewardModelInitConfig(init='a', ensemble=('b', 'c'), aggregate='worst')
  return dataclasses.replace(config, **changes)


def through_json(config: Any) -> Any:
  return from_dict(type(config), json.loads(canonical_json(to_dict(config))))


@pytest.mark.parametrize('rewards', [REWARDS, REWARDS[:1], ()], ids=len)
def test_tuples_of_configs_survive_json(rewards: tuple[RewardConfig, ...]) -> None:
  """They come back as tuples of the class, equal, whatever their number; so do plain tuples."""
  config = make_config(rollout=RolloutConfig(rewards=rewards))
  again = through_json(config)
  assert again == config
  assert type(again.rollout.rewards) is tuple and type(again.reward_model.ensemble) is tuple
  assert all(type(reward) is RewardConfig for reward in again.rollout.rewards)


def test_unknown_fields_within_tuples_get_a_suggestion() -> None:
  values = to_dict(make_config())
  values['rollout']['rewards'][1]['wieght'] = 1.0
  with pytest.raises(UserError, match="RewardConfig has no field 'wieght': did you mean 'weight'"):
    from_dict(ExperimentConfig, values)


def altered(number: int, **changes: Any) -> ExperimentConfig:
  rewards = list(REWARDS)
  rewards[number] = dataclasses.replace(rewards[number], **changes)
  return make_config(rollout=RolloutConfig(rewards=tuple(rewards)))


@pytest.mark.parametrize(
  ('number', 'changes', 'words'),
  [
    (0, {'weight': '1'}, 'float, not str'),
    (1, {'clip_above': True}, 'float or NoneType, not bool'),
    (1, {'weight': float('nan')}, 'finite'),
    (2, {'source': None}, 'str, not NoneType'),
  ],
)
def test_types_are_checked_within_tuples(number: int, changes: dict[str, Any], words: str) -> None:
  """The field is named with its place, before anything that relies on its type."""
  (name,) = changes
  with pytest.raises(ConfigError) as caught:
    altered(number, **changes).validate()
  assert caught.value.field == f'rollout.rewards[{number}].{name}' and words in str(caught.value)


@pytest.mark.parametrize(
  ('rewards', 'kind'),
  [(REWARDS[0], 'RewardConfig'), (list(REWARDS), 'list'), ((REWARDS[0], 'task'), 'tuple')],
)
def test_only_tuples_of_the_class_will_do(rewards: Any, kind: str) -> None:
  with pytest.raises(ConfigError, match=rf'rollout.rewards.*not {kind}'):
    check_types(make_config(rollout=RolloutConfig(rewards=rewards)))


def test_an_ensemble_is_a_tuple_of_texts() -> None:
  """A bare text would be an ensemble of letters."""
  config = make_config()
  config.reward_model.ensemble = 'runs/b'  # type: ignore[assignment]
  with pytest.raises(ConfigError, match='reward_model.ensemble.*not str'):
    config.validate()


def test_differences_name_what_is_in_a_tuple() -> None:
  """The whole tuple is shown: entries may have been put in between."""
  (line,) = differences(to_dict(make_config()), to_dict(altered(0, weight=3.0)))
  assert line.startswith('rollout.rewards: [') and "'weight': 3.0" in line
