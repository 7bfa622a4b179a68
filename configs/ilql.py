"""ILQL on the embedded reviews: Q-learning on rated responses, and a tilted policy."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.objectives.ilql import ILQLConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """The policy is the SFT policy, further trained, tilted by decode_beta (Q - V)."""
  return ExperimentConfig(
    name='ilql',
    # The score comes back token by token, each a step of the slow copies behind the next: over
    # responses of 16 tokens they must be fast for the first token to learn in 600 updates.
    objective=ILQLConfig(gamma=1.0, target_rate=0.1, cql_coefficient=0.01, awac_beta=0.5),
    steps=600,
    batch_size=128,
    policy=InitConfig(init='configs/sft.py'),
    reward_model=RewardModelInitConfig(init='configs/reward_model.py'),
    optimizer=OptimizerConfig(learning_rate=2e-3, schedule='linear', warmup_updates=20),
    evaluation=EvaluationConfig(every=100),
  )
