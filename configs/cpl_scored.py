"""Contrastive preference learning from scores on the embedded reviews: pairs of rated responses."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.objectives.cpl_scored import ScoredCPLConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """CPL-KL on every ordered pair of eight rated responses to different prompts."""
  return ExperimentConfig(
    name='cpl_scored',
    # Groups, so that a batch can be accumulated and cut over devices.
    objective=ScoredCPLConfig(alpha=0.5, lam=0.75, use_reference=True, group_size=8),
    steps=200,
    batch_size=128,
    policy=InitConfig(init='configs/sft.py'),
    reward_model=RewardModelInitConfig(init='configs/reward_model.py'),
    optimizer=OptimizerConfig(learning_rate=5e-4, schedule='linear', warmup_updates=20),
    evaluation=EvaluationConfig(every=50),
  )
