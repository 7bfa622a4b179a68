"""Contrastive preference learning where it is exact: a double integrator with quadratic costs."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig
from rlhf_jax.data.config import CONTROL, DataConfig
from rlhf_jax.models.gaussian import GaussianPolicyConfig
from rlhf_jax.objectives.cpl import CPLConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config(arg: str | None = None) -> ExperimentConfig:
  """CPL from behaviour cloning, with regret labels; 'return' labels by rewards instead.

  With alpha 1 and no conservative bias the optimal policy is the maximum of the likelihood.
  """
  data = DataConfig(source=CONTROL, responses='all')
  if arg is not None:
    data.lqr.labels = arg
  return ExperimentConfig(
    name='lqr_cpl',
    objective=CPLConfig(alpha=1.0, lam=1.0),
    data=data,
    model=GaussianPolicyConfig(),
    policy=InitConfig(init='configs/lqr_sft.py'),
    steps=390,
    batch_size=256,
    optimizer=OptimizerConfig(learning_rate=0.1, schedule='cosine'),
    evaluation=EvaluationConfig(every=65, records=2000, batch_size=500),
  )
