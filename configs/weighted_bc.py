"""Behaviour cloning weighted by exp(rating) on the embedded reviews."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.objectives.weighted_bc import WeightedBCConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """Reward-weighted regression on 16,000 rated responses."""
  return ExperimentConfig(
    name='weighted_bc',
    objective=WeightedBCConfig(variant='weighted', temperature=1.5),
    steps=200,
    batch_size=128,
    policy=InitConfig(init='configs/sft.py'),
    reward_model=RewardModelInitConfig(init='configs/reward_model.py'),
    optimizer=OptimizerConfig(learning_rate=5e-4, schedule='linear', warmup_updates=20),
    evaluation=EvaluationConfig(every=50),
  )
