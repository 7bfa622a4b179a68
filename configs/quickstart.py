"""SFT, PPO, DPO and CPL on the embedded reviews, three seeds, against the known optimum."""

import dataclasses

from configs import cpl, dpo, ppo, reward_model, sft
from rlhf_jax.config import EvaluationConfig
from rlhf_jax.study import StudyConfig


def get_config() -> StudyConfig:
  """A study that a laptop finishes in minutes."""
  objectives = {
    'ppo': dataclasses.replace(
      ppo.get_config(), evaluation=EvaluationConfig(every=10, prompts=256)
    ),
    'dpo': dataclasses.replace(
      dpo.get_config(), evaluation=EvaluationConfig(every=40, prompts=256)
    ),
    'cpl': dataclasses.replace(
      cpl.get_config(), evaluation=EvaluationConfig(every=40, prompts=256)
    ),
  }
  return StudyConfig(
    name='Quickstart: objectives on the embedded reviews',
    sft=sft.get_config(),
    # A quarter less than by itself, where it is as good already.
    reward_model=dataclasses.replace(reward_model.get_config(), steps=600),
    objectives=objectives,
    seeds=(0, 1, 2),
    frontier_samples=512,
  )
