"""Contrastive preference learning on human comparisons, from the SFT policy (hh_harmless.py).

  python -m experiments.train --config=configs/hh_harmless_cpl.py --workdir=runs/hh_cpl \\
    --config.data.path=harmless_base_test.jsonl.gz
"""

from configs import hh_harmless
from rlhf_jax.config import ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.objectives.cpl import CPLConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """CPL with log-ratios to the SFT policy, its warm start, and cloning of the chosen responses."""
  return ExperimentConfig(
    name='hh_harmless_cpl',
    objective=CPLConfig(
      alpha=0.1, lam=0.75, use_reference=True, bc_coefficient=1.0, bc_responses='chosen'
    ),
    steps=54,
    batch_size=32,
    data=hh_harmless.data(),
    policy=InitConfig(init=hh_harmless.SFT),
    reward_model=RewardModelInitConfig(init=hh_harmless.REWARD_MODEL),
    optimizer=OptimizerConfig(learning_rate=2e-4, schedule='linear', warmup_updates=10),
    evaluation=hh_harmless.evaluation(every=27),
  )
