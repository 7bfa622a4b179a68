"""Reward model from ratings: regression, or ordered classes."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import check_float, check_shapes
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.metrics import Mean, Metrics
from rlhf_jax.common.types import Ratings
from rlhf_jax.objectives.base import Actors, Demands, LossOutput, Normalization, Objective, Params
from rlhf_jax.objectives.reward_model import check_normalization

Array = jax.Array


@dataclasses.dataclass(kw_only=True)
class RatingRewardConfig:
  """Reward model of scores given one by one."""

  # 'squared': regression on the scores (HelpSteer, Wang et al. 2023); 'classes': the likelihood of
  # the class between two cutpoints in a proportional-odds model (McCullagh 1980), which with one
  # cutpoint is logistic regression on good and bad.
  variant: str = 'squared'
  # Scores that part the classes, ascending; 'classes' only.
  cutpoints: tuple[float, ...] = ()
  # As in `RewardModelConfig`; regression has the units of the scores already.
  normalization: str = 'none'
  normalization_samples: int = 256

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if self.variant not in ('squared', 'classes'):
      raise ConfigError(f'{path}.variant', self.variant, "'squared' or 'classes'")
    if (self.variant == 'classes') != bool(self.cutpoints):
      raise ConfigError(
        f'{path}.cutpoints', self.cutpoints, "numbers with variant 'classes', none otherwise"
      )
    if any(b <= a for a, b in zip(self.cutpoints, self.cutpoints[1:], strict=False)):
      raise ConfigError(f'{path}.cutpoints', self.cutpoints, 'numbers in ascending order')
    check_normalization(path, self.normalization, self.normalization_samples)


def proportional_odds(scores: Array, ratings: Array, cutpoints: tuple[float, ...]) -> Array:
  """Negative log-likelihood of each rating's class, `[B]` float32 (McCullagh 1980, section 2).

    P(rating > c_k) = sigmoid(score - c_k),   P(class k) = P(> c_{k-1}) - P(> c_k)

  A rating equal to a cutpoint is in the class below it.

  Args:
    scores: `[B]` float.
    ratings: `[B]` float.
    cutpoints: ascending.
  """
  check_shapes('scores:B ratings:B', scores=scores, ratings=ratings)
  check_float(scores=scores, ratings=ratings)
  edges = jnp.asarray(cutpoints, jnp.float32)
  classes = (ratings[:, None] > edges).sum(-1)
  below = scores - edges[jnp.maximum(classes - 1, 0)]
  above = scores - edges[jnp.minimum(classes, len(cutpoints) - 1)]
  first, last = classes == 0, classes == len(cutpoints)
  # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a))
  gap = edges[jnp.minimum(classes, len(cutpoints) - 1)] - edges[jnp.maximum(classes - 1, 0)]
  width = jnp.where(first | last, 1.0, gap)
  return -(
    jnp.where(first, 0.0, jax.nn.log_sigmoid(below))
    + jnp.where(last, 0.0, jax.nn.log_sigmoid(-above))
    + jnp.where(first | last, 0.0, jnp.log(-jnp.expm1(-width)))
  )


def loss(config: RatingRewardConfig, actors: Actors, params: Params, batch: Ratings) -> LossOutput:
  """Squared error, or negative log-likelihood of classes, mean over responses."""
  assert actors.reward is not None
  scores = actors.reward(params, batch.sequences).astype(jnp.float32)
  errors = jnp.square(scores - batch.score)
  metrics: Metrics = {'squared_error': Mean.of(errors), 'score': Mean.of(scores)}
  if config.variant == 'squared':
    return Mean.of(errors), metrics
  edges = jnp.asarray(config.cutpoints, jnp.float32)
  predicted, rated = ((x[:, None] > edges).sum(-1) for x in (scores, batch.score))
  losses = proportional_odds(scores, batch.score, config.cutpoints)
  return Mean.of(losses), {**metrics, 'class_accuracy': Mean.of(predicted == rated)}


def demands(config: RatingRewardConfig) -> Demands:
  """The normaliser."""
  return Demands(normalization=Normalization(config.normalization, config.normalization_samples))


OBJECTIVE = Objective(
  'reward_rating', RatingRewardConfig, 'ratings', loss, trains='reward_model', demands=demands
)
