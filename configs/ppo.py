"""PPO on the embedded reviews against the reward model, from the SFT policy."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.objectives.kl_penalty import KLPenaltyConfig
from rlhf_jax.objectives.ppo import PPOConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """Two epochs of two minibatches a rollout; the value function starts as the reward model."""
  return ExperimentConfig(
    name='ppo',
    objective=PPOConfig(
      epochs=2,
      minibatches=2,
      kl=KLPenaltyConfig(coefficient=1.0),
      value_model='reward_model',
      lam=0.95,
    ),
    steps=60,
    batch_size=128,
    policy=InitConfig(init='configs/sft.py'),
    reward_model=RewardModelInitConfig(init='configs/reward_model.py'),
    optimizer=OptimizerConfig(learning_rate=1.5e-4, schedule='linear', epsilon=1e-5),
    evaluation=EvaluationConfig(every=10),
  )
