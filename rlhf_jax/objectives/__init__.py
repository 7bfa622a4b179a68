"""Objectives: one file each; a config's type selects the objective."""

from rlhf_jax.objectives import cpl, dpo, ppo, reward_model, sft
from rlhf_jax.objectives.base import Actors, LossOutput, Objective
from rlhf_jax.objectives.cpl import CPLConfig
from rlhf_jax.objectives.dpo import DPOConfig
from rlhf_jax.objectives.ppo import PPOConfig
from rlhf_jax.objectives.reward_model import RewardModelConfig
from rlhf_jax.objectives.sft import SFTConfig

ObjectiveConfig = SFTConfig | RewardModelConfig | DPOConfig | CPLConfig | PPOConfig

OBJECTIVES: dict[str, Objective] = {
  objective.name: objective
  for objective in (
    sft.OBJECTIVE,
    reward_model.OBJECTIVE,
    dpo.OBJECTIVE,
    cpl.OBJECTIVE,
    ppo.OBJECTIVE,
  )
}


def objective_of(config: ObjectiveConfig) -> Objective:
  """The row of the table that a config's type selects."""
  for objective in OBJECTIVES.values():
    if type(config) is objective.config:
      return objective
  raise TypeError(f'{type(config).__name__} is not the config of any objective.')


__all__ = [
  'Actors',
  'CPLConfig',
  'DPOConfig',
  'LossOutput',
  'OBJECTIVES',
  'Objective',
  'ObjectiveConfig',
  'PPOConfig',
  'RewardModelConfig',
  'SFTConfig',
  'objective_of',
]
