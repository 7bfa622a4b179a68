"""Process reward model on word-by-word ratings of the embedded reviews."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig
from rlhf_jax.objectives.reward_process import ProcessRewardConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """A new head on the SFT policy's trunk."""
  return ExperimentConfig(
    name='reward_process',
    objective=ProcessRewardConfig(),
    steps=400,
    batch_size=64,
    policy=InitConfig(init='configs/sft.py'),
    optimizer=OptimizerConfig(learning_rate=3e-3, schedule='cosine', warmup_updates=20),
    evaluation=EvaluationConfig(every=100, records=2000),
  )
