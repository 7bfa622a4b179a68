"""DPO, online DPO, PPO and RLOO with small steps and much data, against the known optimum."""

import dataclasses
from typing import Any

from configs import dpo, online_dpo, ppo, reward_model, rloo, sft, tilted_bc
from rlhf_jax.config import EvaluationConfig, check_argument
from rlhf_jax.data.config import DataConfig, ReviewsConfig
from rlhf_jax.objectives.kl_penalty import KLPenaltyConfig
from rlhf_jax.objectives.tilted_bc import TiltedBCConfig
from rlhf_jax.rollout.config import RewardConfig, RolloutConfig
from rlhf_jax.study import StudyConfig

COMPARISONS = 64_000
SEEDS = (0, 1, 2, 3, 4)
DATA = DataConfig(reviews=ReviewsConfig(comparisons=COMPARISONS, demonstrations=24_000))
GOLD = RolloutConfig(rewards=(RewardConfig(source='task'),))
# beta, in nats of gold reward, whose optimal policy has a KL near 1 nat.
BETA = 1.3


def slowly(config: Any, learning_rate: float, every: int, **changes: Any) -> Any:
  """A stage on the study's data, with small steps."""
  settings = {
    'data': DATA,
    'optimizer': dataclasses.replace(config.optimizer, learning_rate=learning_rate),
    'evaluation': EvaluationConfig(every=every, prompts=512, batch_size=128),
    **changes,
  }
  return dataclasses.replace(config, **settings)


def short() -> dict[str, Any]:
  """At the coefficients of their configs, far from converged."""
  return {
    'dpo': slowly(dpo.get_config(), 2e-4, 50, steps=600),
    'online_dpo': slowly(online_dpo.get_config(), 2e-4, 20, steps=200, rollout=GOLD),
    'ppo': slowly(ppo.get_config(), 1e-4, 10, steps=100, rollout=GOLD),
    'rloo': slowly(rloo.get_config(), 2e-4, 10, steps=100, batch_size=32, rollout=GOLD),
  }


def distilled() -> dict[str, Any]:
  """The optimal policy of BETA, imitated as 16 samples a prompt tell of it, which flattens it.

  What it reaches, this decoder can be; more of it may be possible.
  """
  objective = TiltedBCConfig(temperature=BETA, samples=16)
  changes: Any = {'steps': 200, 'batch_size': 32, 'objective': objective, 'rollout': GOLD}
  return {'distilled': slowly(tilted_bc.get_config(), 1e-3, 50, **changes)}


def converged() -> dict[str, Any]:
  """Long, and at coefficients whose optimum is that of BETA.

  DPO's is that of beta times the temperature of its labels, the unit of its rewards. Online DPO's
  labels have no noise, and so no such optimum: it keeps its beta.
  """
  of_labels = BETA / DATA.reviews.labels.temperature

  def at(config: Any, **settings: Any) -> Any:
    return dataclasses.replace(config.objective, **settings)

  penalty = {'kl': KLPenaltyConfig(coefficient=BETA)}
  stages = short()
  coefficients: dict[str, dict[str, Any]] = {
    'dpo': {'beta': of_labels},
    'online_dpo': {},
    'ppo': penalty,
    'rloo': penalty,
  }
  return {
    name: dataclasses.replace(
      stage,
      steps=4 * stage.steps,
      objective=at(stage, **coefficients[name]),
      evaluation=dataclasses.replace(stage.evaluation, every=4 * stage.evaluation.every),
    )
    for name, stage in stages.items()
  }


ARMS = {'short': short, 'distilled': distilled, 'converged': converged}


def get_config(arg: str | None = None) -> StudyConfig:
  """What the objectives can do where neither data nor reward model are short; five seeds.

  Online objectives are paid, and online DPO is judged, by the gold reward itself: what keeps them
  from the optimum is then their own. DPO learns from 64,000 noisy comparisons. Arguments 'short'
  (the default), 'distilled' and 'converged' say which arms; 'converged/dpo,rloo' takes some.
  """
  arm, _, names = ('short' if arg is None else arg).partition('/')
  check_argument(arm, ARMS)
  objectives = ARMS[arm]()
  if names:
    for name in names.split(','):
      check_argument(name, objectives)
    objectives = {name: objectives[name] for name in names.split(',')}
  start = dataclasses.replace(sft.get_config(), data=DATA, steps=1000)
  judge = dataclasses.replace(reward_model.get_config(), data=DATA)
  return StudyConfig(
    name='Distance to the known optimum',
    sft=start,
    reward_model=judge,
    objectives=objectives,
    seeds=SEEDS,
    frontier_samples=1024,
  )
