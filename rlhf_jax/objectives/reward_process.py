"""Process reward model: a score for every step of a response."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.metrics import Mean, Metrics
from rlhf_jax.common.types import StepRatings
from rlhf_jax.objectives.base import Actors, LossOutput, Objective, Params

Array = jax.Array


@dataclasses.dataclass(kw_only=True)
class ProcessRewardConfig:
  """Process-supervised reward model (Uesato et al. 2022; Lightman et al. 2023).

  As a policy's reward it pays every token its score; only scores at the ends of steps are trained.
  """

  # 'squared': regression on the steps' scores; 'binary': logistic regression on whether they are
  # above the threshold (correct steps in Lightman et al. 2023).
  variant: str = 'squared'
  # 'binary' only.
  threshold: float = 0.0

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if self.variant not in ('squared', 'binary'):
      raise ConfigError(f'{path}.variant', self.variant, "'squared' or 'binary'")


def loss(
  config: ProcessRewardConfig, actors: Actors, params: Params, batch: StepRatings
) -> LossOutput:
  """Squared error or binary cross-entropy at the ends of steps, mean over steps."""
  assert actors.token_reward is not None
  mask = batch.score_mask
  # Masked first: between steps either may be anything, and must not make nan in the gradient.
  scores = jnp.where(mask, actors.token_reward(params, batch.sequences), 0.0).astype(jnp.float32)
  targets = jnp.where(mask, batch.score, 0.0)
  errors = Mean.of(jnp.square(scores - targets), mask)
  metrics: Metrics = {'squared_error': errors, 'score': Mean.of(scores, mask)}
  if config.variant == 'squared':
    return errors, metrics
  good = targets > config.threshold
  losses = jax.nn.softplus(jnp.where(good, -scores, scores))
  return Mean.of(losses, mask), {**metrics, 'step_accuracy': Mean.of((scores > 0) == good, mask)}


OBJECTIVE = Objective(
  'reward_process', ProcessRewardConfig, 'step_ratings', loss, trains='reward_model'
)
