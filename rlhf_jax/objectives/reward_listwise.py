"""Reward model from rankings: Plackett-Luce, and best-of-n labels as its first choice."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import check_float, check_shapes
from rlhf_jax.common.metrics import Mean
from rlhf_jax.common.types import Rankings
from rlhf_jax.objectives.base import (
  Actors,
  Demands,
  LossOutput,
  Normalization,
  Objective,
  Params,
  flatten_rows,
)
from rlhf_jax.objectives.reward_model import check_normalization

Array = jax.Array


@dataclasses.dataclass(kw_only=True)
class ListwiseRewardConfig:
  """Plackett-Luce reward model (Plackett 1975; best-of-n labels as in Ziegler et al. 2019)."""

  # As in `RewardModelConfig`.
  normalization: str = 'demonstrations'
  normalization_samples: int = 256

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    check_normalization(path, self.normalization, self.normalization_samples)


def plackett_luce(scores: Array, rank: Array, mask: Array) -> Array:
  """Negative log-likelihood of rankings, `[B]` float32.

    sum_i [ logsumexp_{j: rank_j >= rank_i} score_j - score_i ]

  over the responses i that something is ranked below. Of equals each is drawn before the others
  (Breslow's treatment of ties), so that ranks 1, 2, 2, 2 are the softmax cross-entropy of a
  best-of-four label (Ziegler et al. 2019, eq. 1).

  Args:
    scores: `[B, K]` float.
    rank: `[B, K]` int, 1 the best.
    mask: `[B, K]` bool, which responses there are.
  """
  check_shapes('scores:BK rank:BK mask:BK', scores=scores, rank=rank, mask=mask)
  check_float(scores=scores)
  scores = jnp.where(mask, scores, 0.0).astype(jnp.float32)
  both = mask[:, :, None] & mask[:, None, :]
  remaining = both & (rank[:, None, :] >= rank[:, :, None])  # [B, i, j]
  beats = (both & (rank[:, None, :] > rank[:, :, None])).any(-1)
  rivals = jnp.where(remaining, scores[:, None, :], -jnp.inf)
  # A response that is not there has no rivals: its place must not make nan in the gradient.
  rivals = jnp.where(beats[:, :, None], rivals, 0.0)
  return jnp.where(beats, jax.nn.logsumexp(rivals, axis=-1) - scores, 0.0).sum(-1)


def loss(
  config: ListwiseRewardConfig, actors: Actors, params: Params, batch: Rankings
) -> LossOutput:
  """Plackett-Luce negative log-likelihood, mean over rankings."""
  del config
  assert actors.reward is not None
  scores = actors.reward(params, flatten_rows(batch.sequences)).reshape(batch.mask.shape)
  losses = plackett_luce(scores, batch.rank, batch.mask)
  difference = scores[:, :, None] - scores[:, None, :]
  ordered = (
    batch.mask[:, :, None]
    & batch.mask[:, None, :]
    & (batch.rank[:, :, None] < batch.rank[:, None, :])
  )
  right = 0.5 * (jnp.sign(difference) + 1)
  best = jnp.where(batch.mask, scores, -jnp.inf).argmax(1, keepdims=True)
  return Mean.of(losses), {
    'pair_accuracy': Mean.of(right, ordered),
    'best_accuracy': Mean.of(jnp.take_along_axis(batch.rank, best, axis=1) == 1),
    'score': Mean.of(scores, batch.mask),
  }


def demands(config: ListwiseRewardConfig) -> Demands:
  """The normaliser."""
  return Demands(normalization=Normalization(config.normalization, config.normalization_samples))


OBJECTIVE = Objective(
  'reward_listwise',
  ListwiseRewardConfig,
  'rankings',
  loss,
  trains='reward_model',
  demands=demands,
)
