"""Preferred-FT: supervised fine-tuning on the chosen responses of the comparisons."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.data.config import DataConfig
from rlhf_jax.objectives.sft import SFTConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """A baseline of the DPO paper."""
  return ExperimentConfig(
    name='preferred_ft',
    objective=SFTConfig(),
    data=DataConfig(responses='preferred'),
    steps=200,
    batch_size=64,
    policy=InitConfig(init='configs/sft.py'),
    reward_model=RewardModelInitConfig(init='configs/reward_model.py'),
    optimizer=OptimizerConfig(learning_rate=5e-4, schedule='linear', warmup_updates=20),
    evaluation=EvaluationConfig(every=50),
  )
