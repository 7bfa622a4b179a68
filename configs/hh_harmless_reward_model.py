"""A Bradley-Terry reward model of human comparisons; trunk from the SFT policy (hh_harmless.py).

  python -m experiments.train --config=configs/hh_harmless_reward_model.py --workdir=runs/hh_rm \\
    --config.data.path=harmless_base_test.jsonl.gz
"""

from configs import hh_harmless
from rlhf_jax.config import ExperimentConfig, InitConfig
from rlhf_jax.objectives.reward_model import RewardModelConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """One epoch under strong weight decay: 1731 comparisons are soon learnt by heart."""
  return ExperimentConfig(
    name='hh_harmless_reward_model',
    objective=RewardModelConfig(normalization='policy_samples'),
    steps=54,
    batch_size=32,
    data=hh_harmless.data(),
    policy=InitConfig(init=hh_harmless.SFT),
    optimizer=OptimizerConfig(
      learning_rate=2e-3, schedule='cosine', warmup_updates=10, weight_decay=10.0
    ),
    evaluation=hh_harmless.evaluation(every=27),
  )
