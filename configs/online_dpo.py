"""Online DPO on the embedded reviews, judged by the reward model, from the SFT policy."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.objectives.online_dpo import OnlineDPOConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """The better and the worse of two responses make a pair."""
  return ExperimentConfig(
    name='online_dpo',
    objective=OnlineDPOConfig(samples=2, beta=0.7),
    steps=120,
    batch_size=64,
    policy=InitConfig(init='configs/sft.py'),
    reward_model=RewardModelInitConfig(init='configs/reward_model.py'),
    optimizer=OptimizerConfig(learning_rate=3e-4, schedule='linear', warmup_updates=10),
    evaluation=EvaluationConfig(every=20),
  )
