"""Reward-weighted imitation on the embedded reviews: SFT samples, weighed by exp(reward / beta)."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.objectives.tilted_bc import TiltedBCConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """Normalised rewards have a standard deviation near 1, so that the optimum's KL is near 0.5."""
  return ExperimentConfig(
    name='tilted_bc',
    objective=TiltedBCConfig(samples=16),
    steps=100,
    batch_size=32,
    policy=InitConfig(init='configs/sft.py'),
    reward_model=RewardModelInitConfig(init='configs/reward_model.py'),
    optimizer=OptimizerConfig(learning_rate=5e-4, schedule='linear', warmup_updates=5),
    evaluation=EvaluationConfig(every=20),
  )
