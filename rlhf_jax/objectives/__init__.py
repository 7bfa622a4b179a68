"""Objectives: one file each; a config's type selects the objective."""

from rlhf_jax.objectives import (
  alol,
  best_of_n,
  cpl,
  cpl_dense,
  cpl_scored,
  dpo,
  grpo,
  ilql,
  iql,
  kto,
  online_dpo,
  orpo,
  ppo,
  reinforce,
  reinforce_pp,
  reward_listwise,
  reward_model,
  reward_process,
  reward_rating,
  rloo,
  sft,
  simpo,
  tilted_bc,
  unlikelihood,
  weighted_bc,
)
from rlhf_jax.objectives.base import Actors, Demands, LossOutput, Objective, ObjectiveConfig

OBJECTIVES: dict[str, Objective] = {
  module.OBJECTIVE.name: module.OBJECTIVE
  for module in (
    sft,
    weighted_bc,
    reward_model,
    reward_listwise,
    reward_rating,
    reward_process,
    dpo,
    simpo,
    orpo,
    unlikelihood,
    cpl,
    cpl_dense,
    cpl_scored,
    kto,
    alol,
    ilql,
    iql,
    ppo,
    rloo,
    reinforce,
    reinforce_pp,
    grpo,
    online_dpo,
    best_of_n,
    tilted_bc,
  )
}


def objective_of(config: ObjectiveConfig) -> Objective:
  """The row of the table that a config's type selects."""
  for objective in OBJECTIVES.values():
    if type(config) is objective.config:
      return objective
  raise TypeError(f'{type(config).__name__} is not the config of any objective.')


def demands_of(config: ObjectiveConfig) -> Demands:
  """What an objective's settings ask of the stage around its loss."""
  return objective_of(config).demands(config)


__all__ = [
  'OBJECTIVES',
  'Actors',
  'Demands',
  'LossOutput',
  'Objective',
  'ObjectiveConfig',
  'demands_of',
  'objective_of',
]
