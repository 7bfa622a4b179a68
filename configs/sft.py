"""Supervised fine-tuning on the embedded reviews: the start of every other stage."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig
from rlhf_jax.objectives import SFTConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config(arg: str | None = None) -> ExperimentConfig:
  """A small decoder from random parameters, trained on reviews of either sentiment."""
  del arg
  return ExperimentConfig(
    name='sft',
    objective=SFTConfig(),
    steps=600,
    batch_size=64,
    optimizer=OptimizerConfig(learning_rate=3e-3, schedule='cosine', warmup_updates=20),
    evaluation=EvaluationConfig(every=200),
  )
