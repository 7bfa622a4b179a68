"""REINFORCE++ on the embedded reviews against the reward model, from the SFT policy."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.objectives.kl_penalty import KLPenaltyConfig
from rlhf_jax.objectives.reinforce_pp import ReinforcePPConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """PPO's updates without its value function."""
  return ExperimentConfig(
    name='reinforce_pp',
    objective=ReinforcePPConfig(kl=KLPenaltyConfig(coefficient=1.0), epochs=2, minibatches=2),
    steps=60,
    batch_size=256,
    policy=InitConfig(init='configs/sft.py'),
    reward_model=RewardModelInitConfig(init='configs/reward_model.py'),
    optimizer=OptimizerConfig(learning_rate=1.5e-4, schedule='linear', warmup_updates=0),
    evaluation=EvaluationConfig(every=10),
  )
