"""Filtered behaviour cloning of the best rated responses on the embedded reviews."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.objectives.weighted_bc import WeightedBCConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """The best quarter of 16,000 rated responses."""
  return ExperimentConfig(
    name='filtered_bc',
    objective=WeightedBCConfig(variant='filtered', keep=0.25),
    steps=200,
    batch_size=128,
    policy=InitConfig(init='configs/sft.py'),
    reward_model=RewardModelInitConfig(init='configs/reward_model.py'),
    optimizer=OptimizerConfig(learning_rate=5e-4, schedule='linear', warmup_updates=20),
    evaluation=EvaluationConfig(every=50),
  )
