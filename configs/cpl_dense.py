"""Dense contrastive preference learning on the embedded reviews: all pairs of rankings of four."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.objectives.cpl_dense import DenseCPLConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """CPL-KL on every ordered pair of each ranking."""
  return ExperimentConfig(
    name='cpl_dense',
    objective=DenseCPLConfig(alpha=0.5, lam=0.75, use_reference=True),
    steps=200,
    batch_size=32,
    policy=InitConfig(init='configs/sft.py'),
    reward_model=RewardModelInitConfig(init='configs/reward_model.py'),
    optimizer=OptimizerConfig(learning_rate=5e-4, schedule='linear', warmup_updates=20),
    evaluation=EvaluationConfig(every=50),
  )
