"""Contrastive preference learning on the embedded reviews, from the SFT policy."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.objectives.cpl import CPLConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """CPL with log-ratios to the SFT policy (CPL-KL); SFT is its behaviour-cloning warm start."""
  return ExperimentConfig(
    name='cpl',
    objective=CPLConfig(alpha=0.5, lam=0.75, use_reference=True),
    steps=200,
    batch_size=64,
    policy=InitConfig(init='configs/sft.py'),
    reward_model=RewardModelInitConfig(init='configs/reward_model.py'),
    optimizer=OptimizerConfig(learning_rate=5e-4, schedule='linear', warmup_updates=20),
    evaluation=EvaluationConfig(every=50),
  )
