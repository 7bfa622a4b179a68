"""Expert iteration on the embedded reviews: the best samples of the policy itself, in rounds."""

from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.objectives.best_of_n import BestOfNConfig
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config() -> ExperimentConfig:
  """A step is a round of 256 prompts; the policy that answers them is the last round's."""
  return ExperimentConfig(
    name='expert_iteration',
    objective=BestOfNConfig(samples=4, sample_from='policy', epochs=2, minibatches=4),
    steps=6,
    batch_size=256,
    policy=InitConfig(init='configs/sft.py'),
    reward_model=RewardModelInitConfig(init='configs/reward_model.py'),
    optimizer=OptimizerConfig(learning_rate=3e-4, schedule='constant', warmup_updates=0),
    evaluation=EvaluationConfig(every=1),
  )
