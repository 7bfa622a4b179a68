"""GRPO on the embedded reviews against the reward model, from the SFT policy."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.objectives.grpo import GRPOConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """Eight responses to each prompt; the KL is in the loss."""
  return ExperimentConfig(
    name='grpo',
    objective=GRPOConfig(samples=8, kl_coefficient=0.5, minibatches=2),
    steps=60,
    batch_size=32,
    policy=InitConfig(init='configs/sft.py'),
    reward_model=RewardModelInitConfig(init='configs/reward_model.py'),
    optimizer=OptimizerConfig(learning_rate=3e-4, schedule='linear', warmup_updates=0),
    evaluation=EvaluationConfig(every=10),
  )
