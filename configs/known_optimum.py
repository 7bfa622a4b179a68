"""DPO, online DPO, PPO and RLOO with small steps and much data, against the known optimum."""

import dataclasses
from typing import Any

from configs import dpo, online_dpo, ppo, reward_model, rloo, sft
from rlhf_jax.config import EvaluationConfig
from rlhf_jax.data.config import DataConfig, ReviewsConfig
from rlhf_jax.rollout.config import RewardConfig, RolloutConfig
from rlhf_jax.study import StudyConfig

COMPARISONS = 64_000
SEEDS = (0, 1, 2, 3, 4)


def get_config(arg: str | None = None) -> StudyConfig:
  """What the objectives can do where neither data nor reward model are short; five seeds.

  Online objectives are paid, and online DPO is judged, by the gold reward itself: what keeps them
  from the optimum is then their own. DPO learns from 64,000 noisy comparisons.
  """
  del arg
  data = DataConfig(reviews=ReviewsConfig(comparisons=COMPARISONS, demonstrations=24_000))
  gold = RolloutConfig(rewards=(RewardConfig(source='task'),))

  def slowly(config: Any, learning_rate: float, every: int, **changes: Any) -> Any:
    optimizer = dataclasses.replace(config.optimizer, learning_rate=learning_rate)
    evaluation = EvaluationConfig(every=every, prompts=512, batch_size=128)
    settings = {'data': data, 'optimizer': optimizer, 'evaluation': evaluation, **changes}
    return dataclasses.replace(config, **settings)

  start = dataclasses.replace(sft.get_config(), data=data, steps=1000)
  judge = dataclasses.replace(reward_model.get_config(), data=data)
  objectives = {
    'dpo': slowly(dpo.get_config(), 2e-4, 50, steps=600),
    'online_dpo': slowly(online_dpo.get_config(), 2e-4, 20, steps=200, rollout=gold),
    'ppo': slowly(ppo.get_config(), 1e-4, 10, steps=100, rollout=gold),
    'rloo': slowly(rloo.get_config(), 2e-4, 10, steps=100, batch_size=32, rollout=gold),
  }
  return StudyConfig(
    name='Distance to the known optimum',
    sft=start,
    reward_model=judge,
    objectives=objectives,
    seeds=SEEDS,
    frontier_samples=1024,
  )
