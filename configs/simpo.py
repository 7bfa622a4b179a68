"""SimPO on the embedded reviews, from the SFT policy."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.objectives.simpo import SimPOConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """The released beta and margin; the reward model only measures."""
  return ExperimentConfig(
    name='simpo',
    objective=SimPOConfig(beta=2.0, gamma=1.0),
    steps=200,
    batch_size=64,
    policy=InitConfig(init='configs/sft.py'),
    reward_model=RewardModelInitConfig(init='configs/reward_model.py'),
    optimizer=OptimizerConfig(learning_rate=1e-4, schedule='linear', warmup_updates=20),
    evaluation=EvaluationConfig(every=50),
  )
