"""Supervised fine-tuning, from random parameters, on the responses people chose (hh_harmless.py).

  python -m experiments.train --config=configs/hh_harmless_sft.py --workdir=runs/hh_sft \\
    --config.data.path=harmless_base_test.jsonl.gz
"""

from configs import hh_harmless
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.objectives.sft import SFTConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """The start of the other hh_harmless stages."""
  return ExperimentConfig(
    name='hh_harmless_sft',
    objective=SFTConfig(),
    steps=260,
    batch_size=32,
    data=hh_harmless.data(),
    model=hh_harmless.model(),
    optimizer=OptimizerConfig(
      learning_rate=3e-3, schedule='cosine', warmup_updates=20, weight_decay=0.1
    ),
    evaluation=hh_harmless.evaluation(every=130),
  )
