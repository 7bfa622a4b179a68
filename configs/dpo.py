"""Direct preference optimisation on the embedded reviews, from the SFT policy."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.objectives.dpo import DPOConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """Sigmoid DPO; the reward model only measures."""
  return ExperimentConfig(
    name='dpo',
    objective=DPOConfig(beta=0.7),
    steps=200,
    batch_size=64,
    policy=InitConfig(init='configs/sft.py'),
    reward_model=RewardModelInitConfig(init='configs/reward_model.py'),
    optimizer=OptimizerConfig(learning_rate=3e-4, schedule='linear', warmup_updates=20),
    evaluation=EvaluationConfig(every=50),
  )
