"""P-IQL on the embedded control task: a reward model of preferences, then implicit Q-learning."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.data.config import CONTROL, DataConfig
from rlhf_jax.models.gaussian import GaussianPolicyConfig
from rlhf_jax.objectives.iql import IQLConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config(arg: str | None = None) -> ExperimentConfig:
  """It takes labels for returns: with regret labels its rewards are advantages (Hejna et al. 2023).

  'return' labels are what it assumes.
  """
  data = DataConfig(source=CONTROL, responses='all')
  if arg is not None:
    data.lqr.labels = arg
  return ExperimentConfig(
    name='lqr_piql',
    objective=IQLConfig(gamma=0.95),
    data=data,
    model=GaussianPolicyConfig(),
    policy=InitConfig(init='configs/lqr_sft.py'),
    reward_model=RewardModelInitConfig(init='configs/lqr_reward_model.py'),
    steps=2000,
    batch_size=256,
    optimizer=OptimizerConfig(learning_rate=3e-3, schedule='cosine'),
    evaluation=EvaluationConfig(every=500, records=0),
  )
