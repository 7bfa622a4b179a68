"""Dense contrastive preference learning on the embedded control task: pairs of scored segments."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, check_argument
from rlhf_jax.data.config import CONTROL, DataConfig
from rlhf_jax.models.gaussian import GaussianPolicyConfig
from rlhf_jax.objectives.cpl_dense import DenseCPLConfig
from rlhf_jax.objectives.cpl_scored import ScoredCPLConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config(arg: str | None = None) -> ExperimentConfig:
  """Pairs of whole batches of 96 scored segments (released code); 'rankings' pairs within fours."""
  check_argument(arg, ('rankings',))
  if arg == 'rankings':
    objective: DenseCPLConfig = DenseCPLConfig()
    evaluation = EvaluationConfig(every=100, records=2000, batch_size=500)
  else:
    # A scored segment by itself makes no pair, so that there is no held-out loss.
    objective = ScoredCPLConfig()
    evaluation = EvaluationConfig(every=100, records=0)
  objective.alpha = objective.lam = 1.0
  return ExperimentConfig(
    name='lqr_cpl_dense',
    objective=objective,
    data=DataConfig(source=CONTROL, responses='all'),
    model=GaussianPolicyConfig(),
    policy=InitConfig(init='configs/lqr_sft.py'),
    steps=400,
    batch_size=96,
    optimizer=OptimizerConfig(learning_rate=0.1, schedule='cosine'),
    evaluation=evaluation,
  )
