"""Process reward model: a score for every step of a response."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.metrics import Mean, Metrics
from rlhf_jax.common.types import StepRatings
from rlhf_jax.objectives.base import Actors, Demands, LossOutput, Objective, Params

Array = jax.Array


@dataclasses.dataclass(kw_only=True)
class ProcessRewardConfig:
  """Process-supervised reward model (Uesato et al. 2022; Lightman et al. 2023).

  As a policy's reward it pays every token its score.
  """

  # 'squared': regression on the steps' scores; 'binary': logistic regression on whether they are
  # above the threshold (correct steps in Lightman et al. 2023).
  variant: str = 'squared'
  # 'binary' only.
  threshold: float = 0.0
  # What the scores of tokens between the ends of steps, <eos> among them, are trained to: 'zero',
  # so that a policy paid token by token is paid for steps alone; 'nothing', for a model that is
  # only asked about steps. 'squared' only: log-odds of 0 would mean that nobody knows.
  between: str = 'zero'

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if self.variant not in ('squared', 'binary'):
      raise ConfigError(f'{path}.variant', self.variant, "'squared' or 'binary'")
    if self.between not in ('zero', 'nothing'):
      raise ConfigError(f'{path}.between', self.between, "'zero' or 'nothing'")
    if self.variant == 'binary' and self.between == 'zero':
      raise ConfigError(
        f'{path}.between',
        self.between,
        "'nothing' with variant 'binary'",
        'Log-odds that steps are right do not add up to a reward of a response.',
      )


def loss(
  config: ProcessRewardConfig, actors: Actors, params: Params, batch: StepRatings
) -> LossOutput:
  """Squared error or binary cross-entropy, mean over the tokens that have something to learn."""
  assert actors.token_reward is not None
  ends = batch.score_mask
  mask = batch.sequences.response_mask if config.between == 'zero' else ends
  # Masked first: elsewhere either may be anything, and must not make nan in the gradient.
  scores = jnp.where(mask, actors.token_reward(params, batch.sequences), 0.0).astype(jnp.float32)
  targets = jnp.where(ends, batch.score, 0.0)
  errors = Mean.of(jnp.square(scores - targets), mask)
  metrics: Metrics = {
    'squared_error': Mean.of(jnp.square(scores - targets), ends),
    'score': Mean.of(scores, ends),
  }
  if config.variant == 'squared':
    return errors, metrics
  good = targets > config.threshold
  losses = jax.nn.softplus(jnp.where(good, -scores, scores))
  return Mean.of(losses, mask), {**metrics, 'step_accuracy': Mean.of((scores > 0) == good, mask)}


def demands(config: ProcessRewardConfig) -> Demands:
  """A model that was only taught the ends of steps cannot pay for every token."""
  if config.between == 'zero':
    return Demands()
  return Demands(
    unpayable="Every token is paid its score: with objective.between 'nothing' those between the "
    'ends of steps have not learnt theirs.'
  )


OBJECTIVE = Objective(
  'reward_process',
  ProcessRewardConfig,
  'step_ratings',
  loss,
  trains='reward_model',
  demands=demands,
  by_token=True,
)
