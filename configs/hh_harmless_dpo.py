"""Direct preference optimisation on human comparisons, from the SFT policy (hh_harmless.py).

  python -m experiments.train --config=configs/hh_harmless_dpo.py --workdir=runs/hh_dpo \\
    --config.data.path=harmless_base_test.jsonl.gz
"""

from configs import hh_harmless
from rlhf_jax.config import ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.objectives.dpo import DPOConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config(arg: str | None = None) -> ExperimentConfig:
  """Sigmoid DPO with the reference's log-probs computed once; the reward model only measures.

  Without the likelihood term both responses lose probability, <eos> included, and sampled responses
  grow long (docs/hh_harmless.md).
  """
  del arg
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
