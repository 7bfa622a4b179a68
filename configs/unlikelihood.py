"""Unlikelihood on the embedded reviews, from the SFT policy."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.objectives.unlikelihood import UnlikelihoodConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """A baseline of the DPO paper. It has no tie to the reference: it is stopped early."""
  return ExperimentConfig(
    name='unlikelihood',
    objective=UnlikelihoodConfig(alpha=0.5),
    steps=100,
    batch_size=64,
    policy=InitConfig(init='configs/sft.py'),
    reward_model=RewardModelInitConfig(init='configs/reward_model.py'),
    optimizer=OptimizerConfig(learning_rate=1e-4, schedule='linear', warmup_updates=20),
    evaluation=EvaluationConfig(every=25),
  )
