"""REINFORCE with a running baseline on the embedded reviews, from the SFT policy."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.objectives.kl_penalty import KLPenaltyConfig
from rlhf_jax.objectives.reinforce import ReinforceConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """One update a rollout."""
  return ExperimentConfig(
    name='reinforce',
    objective=ReinforceConfig(kl=KLPenaltyConfig(coefficient=1.0)),
    steps=100,
    batch_size=128,
    policy=InitConfig(init='configs/sft.py'),
    reward_model=RewardModelInitConfig(init='configs/reward_model.py'),
    optimizer=OptimizerConfig(learning_rate=3e-4, schedule='linear', warmup_updates=0),
    evaluation=EvaluationConfig(every=20),
  )
