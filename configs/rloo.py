"""RLOO on the embedded reviews against the reward model, from the SFT policy."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.objectives.kl_penalty import KLPenaltyConfig
from rlhf_jax.objectives.rloo import RLOOConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """Four responses to each prompt; two updates a rollout."""
  return ExperimentConfig(
    name='rloo',
    objective=RLOOConfig(samples=4, kl=KLPenaltyConfig(coefficient=1.0), minibatches=2),
    steps=60,
    batch_size=64,
    policy=InitConfig(init='configs/sft.py'),
    reward_model=RewardModelInitConfig(init='configs/reward_model.py'),
    optimizer=OptimizerConfig(learning_rate=3e-4, schedule='linear', warmup_updates=0),
    evaluation=EvaluationConfig(every=10),
  )
