"""KTO on the embedded reviews: responses rated one by one, good above 0."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.objectives.kto import KTOConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """Twice the rows of a batch of pairs: as many responses."""
  return ExperimentConfig(
    name='kto',
    objective=KTOConfig(beta=1.0),
    steps=200,
    batch_size=128,
    policy=InitConfig(init='configs/sft.py'),
    reward_model=RewardModelInitConfig(init='configs/reward_model.py'),
    optimizer=OptimizerConfig(learning_rate=1.5e-4, schedule='linear', warmup_updates=20),
    evaluation=EvaluationConfig(every=50),
  )
