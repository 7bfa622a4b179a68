"""A Bradley-Terry reward model on the embedded reviews, its trunk from the SFT policy."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig
from rlhf_jax.objectives.reward_model import RewardModelConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config(arg: str | None = None) -> ExperimentConfig:
  """Comparisons of two reviews of the same beginning, labelled with noise.

  `configs/reward_model.py:1` has seed 1: another head and another order, as an ensemble needs.
  """
  return ExperimentConfig(
    name='reward_model',
    seed=0 if arg is None else int(arg),
    objective=RewardModelConfig(),
    steps=800,
    batch_size=64,
    policy=InitConfig(init='configs/sft.py'),
    optimizer=OptimizerConfig(learning_rate=3e-3, schedule='cosine', warmup_updates=20),
    evaluation=EvaluationConfig(every=200, records=2000),
  )
