"""A reward model of the embedded control task's comparisons: what P-IQL is paid."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig
from rlhf_jax.data.config import CONTROL, DataConfig
from rlhf_jax.models.gaussian import GaussianPolicyConfig
from rlhf_jax.objectives.reward_model import RewardModelConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config(arg: str | None = None) -> ExperimentConfig:
  """Rewards of steps, summed over segments; 'return' labels compare true rewards."""
  data = DataConfig(source=CONTROL, responses='all')
  if arg is not None:
    data.lqr.labels = arg
  return ExperimentConfig(
    name='lqr_reward_model',
    objective=RewardModelConfig(normalization='none'),
    data=data,
    model=GaussianPolicyConfig(),
    steps=400,
    batch_size=256,
    optimizer=OptimizerConfig(learning_rate=3e-3, schedule='cosine'),
    evaluation=EvaluationConfig(every=100, records=2000, batch_size=500),
  )
