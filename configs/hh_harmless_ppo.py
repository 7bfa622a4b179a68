"""PPO against the reward model of human comparisons, from the SFT policy (hh_harmless.py).

  python -m experiments.train --config=configs/hh_harmless_ppo.py --workdir=runs/hh_ppo \\
    --config.data.path=harmless_base_test.jsonl.gz
"""

from configs import hh_harmless
from rlhf_jax.config import ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.objectives.kl_penalty import KLPenaltyConfig
from rlhf_jax.objectives.ppo import PPOConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """Two epochs of two minibatches a rollout; the value function starts as the reward model."""
  return ExperimentConfig(
    name='hh_harmless_ppo',
    objective=PPOConfig(
      epochs=2,
      minibatches=2,
      kl=KLPenaltyConfig(coefficient=0.1),
      value_model='reward_model',
      lam=0.95,
    ),
    steps=40,
    batch_size=64,
    data=hh_harmless.data(),
    policy=InitConfig(init=hh_harmless.SFT),
    reward_model=RewardModelInitConfig(init=hh_harmless.REWARD_MODEL),
    optimizer=OptimizerConfig(learning_rate=3e-4, epsilon=1e-5),
    evaluation=hh_harmless.evaluation(every=20),
  )
