"""Where the models that a stage starts from are named in its config, by role."""

from typing import NamedTuple


class Init(NamedTuple):
  """A run directory or a config, and which checkpoint of it."""

  init: str
  checkpoint: str


def field_of(role: str) -> str:
  """The field of a config that names the stage of a role: 'reward_model_1' -> 'reward_model'."""
  return 'policy' if role == 'policy' else 'reward_model'


def is_term(role: str) -> bool:
  """Whether a role is a reward model of its own among the rollout's rewards, 'reward_0', ..."""
  return role.startswith('reward_') and role.removeprefix('reward_').isdigit()


def path_of(role: str) -> str:
  """Where a config names the stage of a role: 'reward_model_1' -> 'reward_model.ensemble'."""
  if is_term(role):
    return f'rollout.rewards[{role.removeprefix("reward_")}].init'
  return f'{field_of(role)}.{"init" if role == field_of(role) else "ensemble"}'
