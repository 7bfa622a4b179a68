"""A-LoL on the embedded reviews: rated responses that are better than the SFT policy's own."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.objectives.alol import ALoLConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """Importance weights of whole responses; rows are drawn by their advantage."""
  return ExperimentConfig(
    name='alol',
    objective=ALoLConfig(variant='sequence'),
    steps=200,
    batch_size=128,
    policy=InitConfig(init='configs/sft.py'),
    reward_model=RewardModelInitConfig(init='configs/reward_model.py'),
    optimizer=OptimizerConfig(learning_rate=1e-4, schedule='linear', warmup_updates=20),
    evaluation=EvaluationConfig(every=50),
  )
