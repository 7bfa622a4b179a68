"""Stages and a study for drills: tiny, of many steps, with a checkpoint every few."""

import dataclasses
import pathlib
from typing import Any

from rlhf_jax.config import InitConfig, RewardModelInitConfig
from rlhf_jax.study import StudyConfig
from rlhf_jax.training.checkpoints import CheckpointConfig
from tests import tiny

HERE = pathlib.Path(__file__)
STEPS = 40


def get_config(arg: str) -> Any:
  """A stage by the name of its case, whose parents are stages of this file; or 'compare'."""
  if arg == 'compare':
    return study()
  config = tiny.make_config(arg, steps=STEPS)
  config.checkpoint = CheckpointConfig(every=4, keep=2)
  config.evaluation = dataclasses.replace(
    config.evaluation, every=10, prompts=tiny.ROWS if arg != 'reward_model' else 0
  )
  if arg != 'sft':
    config.policy = InitConfig(init=f'{HERE}:sft')
  if arg == 'ppo':
    config.reward_model = RewardModelInitConfig(init=f'{HERE}:reward_model')
  return config


def study() -> StudyConfig:
  """SFT, a reward model, DPO and PPO, of a dozen steps each."""
  stages = {name: get_config(name) for name in ('sft', 'reward_model', 'dpo', 'ppo')}
  for stage in stages.values():
    stage.steps = 12
    stage.policy = InitConfig()
    stage.reward_model = RewardModelInitConfig()
    stage.evaluation = dataclasses.replace(
      stage.evaluation, every=6, prompts=tiny.ROWS, records=tiny.ROWS
    )
  return StudyConfig(
    name='drill',
    sft=stages['sft'],
    reward_model=stages['reward_model'],
    objectives={name: stages[name] for name in ('dpo', 'ppo')},
    seeds=(0,),
    frontier_samples=16,
  )
