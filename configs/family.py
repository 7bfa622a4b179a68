"""Every policy objective on the embedded reviews, against the known optimum."""

import dataclasses
import importlib

from configs import reward_model, sft
from rlhf_jax.config import check_argument
from rlhf_jax.study import StudyConfig

OBJECTIVES = (
  'preferred_ft',
  'filtered_bc',
  'weighted_bc',
  'unlikelihood',
  'dpo',
  'simpo',
  'orpo',
  'cpl',
  'cpl_dense',
  'cpl_scored',
  'kto',
  'alol',
  'ilql',
  'best_of_n',
  'tilted_bc',
  'expert_iteration',
  'online_dpo',
  'reinforce',
  'reinforce_pp',
  'rloo',
  'grpo',
  'ppo',
)


def get_config(arg: str | None = None) -> StudyConfig:
  """The whole family, or with an argument like `dpo,kto` a part of it; one seed."""
  names = OBJECTIVES if arg is None else tuple(arg.split(','))
  for name in names:
    check_argument(name, OBJECTIVES)
  stages = {name: importlib.import_module(f'configs.{name}').get_config() for name in names}
  prompts = {
    name: dataclasses.replace(stage, evaluation=dataclasses.replace(stage.evaluation, prompts=256))
    for name, stage in stages.items()
  }
  return StudyConfig(
    name='Every objective on the embedded reviews',
    sft=sft.get_config(),
    reward_model=reward_model.get_config(),
    objectives=prompts,
    seeds=(0,),
    frontier_samples=512,
  )
