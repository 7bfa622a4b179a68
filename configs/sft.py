"""Supervised fine-tuning on the embedded reviews: the start of every other stage."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, check_argument
from rlhf_jax.data.config import DataConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.objectives.sft import SFTConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config(arg: str | None = None) -> ExperimentConfig:
  """A small decoder from random parameters, trained on reviews of either sentiment.

  `configs/sft.py:all` imitates both responses of every comparison as well, as CPL's behaviour
  cloning does.
  """
  check_argument(arg, ('all',))
  return ExperimentConfig(
    name='sft',
    objective=SFTConfig(),
    data=DataConfig(responses=arg or 'chosen'),
    # Rounded up, so that a tensor axis divides the vocabulary.
    model=ModelConfig(vocab_multiple=8),
    steps=600,
    batch_size=64,
    optimizer=OptimizerConfig(learning_rate=3e-3, schedule='cosine', warmup_updates=20),
    evaluation=EvaluationConfig(every=200),
  )
