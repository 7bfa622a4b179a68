"""Behaviour cloning of all segments of the embedded control task: where CPL starts."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig
from rlhf_jax.data.config import CONTROL, DataConfig
from rlhf_jax.models.gaussian import GaussianPolicyConfig
from rlhf_jax.objectives.sft import SFTConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config(arg: str | None = None) -> ExperimentConfig:
  """A linear policy; 'preferred' imitates the preferred segments only."""
  return ExperimentConfig(
    name='lqr_sft',
    objective=SFTConfig(),
    data=DataConfig(source=CONTROL, responses='all' if arg is None else arg),
    model=GaussianPolicyConfig(),
    steps=200,
    batch_size=256,
    optimizer=OptimizerConfig(learning_rate=0.1, schedule='cosine'),
    evaluation=EvaluationConfig(every=50, records=2000, batch_size=500),
  )
