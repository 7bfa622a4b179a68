"""Direct preference optimisation on human comparisons, from the SFT policy (hh_harmless.py).

  python -m experiments.train --config=configs/hh_harmless_dpo.py --workdir=runs/hh_dpo \\
    --config.data.path=harmless_base_test.jsonl.gz
"""

from configs import hh_harmless
from rlhf_jax.config import (
  ExperimentConfig,
  InitConfig,
  RewardModelInitConfig,
  check_argument,
)
from rlhf_jax.objectives.dpo import DPOConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config(arg: str | None = None) -> ExperimentConfig:
  """Sigmoid DPO with the reference's log-probs computed once; the reward model only measures.

  Without the likelihood term both responses lose probability, <eos> included, and sampled responses
  grow long (docs/hh_harmless.md).

  `configs/hh_harmless_dpo.py:authors` has the recipe of the authors' released code: batches of 64,
  RMSprop at 5e-7 after 150 steps of warm-up, one epoch (their rate at update t is t / 151).
  """
  check_argument(arg, ('authors',))
  if arg == 'authors':
    authors = get_config()
    authors.name = 'hh_harmless_dpo_authors'
    authors.objective = DPOConfig(beta=0.1)
    authors.batch_size = 64
    authors.steps = 27
    authors.optimizer = OptimizerConfig(
      name='rmsprop', learning_rate=5e-7, b2=0.99, warmup_updates=151, clip_norm=10.0
    )
    return authors
  return ExperimentConfig(
    name='hh_harmless_dpo',
    objective=DPOConfig(beta=0.1, nll_coefficient=1.0, reference='cached'),
    steps=54,
    batch_size=32,
    data=hh_harmless.data(),
    policy=InitConfig(init=hh_harmless.SFT),
    reward_model=RewardModelInitConfig(init=hh_harmless.REWARD_MODEL),
    optimizer=OptimizerConfig(learning_rate=2e-4, schedule='linear', warmup_updates=10),
    evaluation=hh_harmless.evaluation(every=27),
  )
