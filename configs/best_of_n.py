"""Best-of-n fine-tuning on the embedded reviews: imitation of the best of several SFT samples."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.objectives.best_of_n import BestOfNConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """The samples come from the frozen SFT policy."""
  return ExperimentConfig(
    name='best_of_n',
    objective=BestOfNConfig(samples=8),
    steps=60,
    batch_size=64,
    policy=InitConfig(init='configs/sft.py'),
    reward_model=RewardModelInitConfig(init='configs/reward_model.py'),
    optimizer=OptimizerConfig(learning_rate=5e-4, schedule='linear', warmup_updates=5),
    evaluation=EvaluationConfig(every=10),
  )
