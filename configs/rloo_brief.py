"""RLOO on the embedded reviews with two rewards: short first, then positive."""

import dataclasses

from configs import rloo
from rlhf_jax.config import ExperimentConfig, RewardModelInitConfig
from rlhf_jax.rollout.config import RewardConfig, RolloutConfig


def get_config() -> ExperimentConfig:
  """An ensemble of three reward models by its worst member, gated by a Python function.

  A response of more than eight words is paid its brevity alone, however positive it is.
  """
  return dataclasses.replace(
    rloo.get_config(),
    name='rloo_brief',
    reward_model=RewardModelInitConfig(
      init='configs/reward_model.py',
      ensemble=('configs/reward_model.py:1', 'configs/reward_model.py:2'),
      aggregate='worst',
    ),
    rollout=RolloutConfig(
      rewards=(
        RewardConfig(source='configs/rewards.py:brevity', gate_below=0.0),
        RewardConfig(source='reward_model', clip_above=6.0),
      )
    ),
  )
