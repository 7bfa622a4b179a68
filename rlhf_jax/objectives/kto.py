"""KTO: learning from responses that are simply good or bad, one by one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rlhf_jax.common.checks import check_float, check_shapes
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.masked import masked_sum
from rlhf_jax.common.metrics import Mean
from rlhf_jax.common.types import Ratings
from rlhf_jax.objectives.base import (
  Actors,
  Demands,
  LossOutput,
  Objective,
  Params,
  always,
  response_logprobs,
)

Array = jax.Array


@dataclasses.dataclass(kw_only=True)
class KTOConfig:
  """Kahneman-Tversky optimisation (Ethayarajh et al. 2024)."""

  # How fast value saturates with the log-ratio (0.1 in the released code).
  beta: float = 0.1
  # Weights of desirable and undesirable responses; weight times count should be alike in both.
  desirable_weight: float = 1.0
  undesirable_weight: float = 1.0
  # Ratings above it are desirable, those below undesirable; those equal to it say nothing.
  threshold: float = 0.0

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    for name in ('beta', 'desirable_weight', 'undesirable_weight'):
      if not getattr(self, name) > 0:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'a number > 0')


def unlearnable(config: KTOConfig, scores: np.ndarray) -> str:
  """Why nothing can be learnt from scores `[N]` on one side of the threshold; '' from others."""
  threshold = np.float32(config.threshold)
  above, below = int((scores > threshold).sum()), int((scores < threshold).sum())
  if above and below:
    return ''
  return (
    f'of {len(scores)} ratings, {scores.min():g} to {scores.max():g}, {above} are above '
    f'objective.threshold={config.threshold:g} and {below} below; expected some of either. '
    'Set --config.objective.threshold between good ratings and bad ones.'
  )


@struct.dataclass
class ReferencedRatings:
  """Ratings with the reference point of the whole batch they are part of.

  Attributes:
    ratings: `[B, ...]`, with the reference's log-probs.
    reference_point: `[B]` float32, the same number in every row.
  """

  ratings: Ratings
  reference_point: Array


def kto(
  logratios: Array,
  desirable: Array,
  reference_point: Array,
  *,
  beta: float,
  desirable_weight: float,
  undesirable_weight: float,
) -> Array:
  """Loss of single responses, `[B]` float32 (Ethayarajh et al. 2024, eq. 8).

    desirable     lambda_D (1 - sigmoid(beta (logratio - z)))
    undesirable   lambda_U (1 - sigmoid(beta (z - logratio)))

  Args:
    logratios: `[B]` float, log pi(y|x) / pi_ref(y|x).
    desirable: `[B]` bool.
    reference_point: `[B]` float, z; no gradient flows through it.
    beta: see `KTOConfig`.
    desirable_weight: lambda_D.
    undesirable_weight: lambda_U.
  """
  check_shapes(
    'logratios:B desirable:B z:B', logratios=logratios, desirable=desirable, z=reference_point
  )
  check_float(logratios=logratios, z=reference_point)
  gap = beta * (logratios.astype(jnp.float32) - jax.lax.stop_gradient(reference_point))
  # 1 - sigmoid(x) = sigmoid(-x)
  return jnp.where(
    desirable, desirable_weight * jax.nn.sigmoid(-gap), undesirable_weight * jax.nn.sigmoid(gap)
  )


def reference_point(actors: Actors, params: Params, reference: Params, ratings: Ratings) -> Array:
  """z: the mean log-ratio of responses to other rows' prompts, not below 0; a float32 scalar.

  It estimates the KL of the policy from the reference. Row i's prompt is put before row i + 1's
  response (cyclically), as in the released code; the mean is over the whole batch.
  """
  sequences = ratings.sequences
  mismatched = dataclasses.replace(
    sequences,
    response=jnp.roll(sequences.response, -1, axis=0),
    response_mask=jnp.roll(sequences.response_mask, -1, axis=0),
  )
  logratios = masked_sum(
    response_logprobs(actors, params, mismatched)
    - response_logprobs(actors, reference, mismatched),
    mismatched.response_mask,
    axis=-1,
  )
  return jnp.maximum(logratios.mean(), 0.0)


def prepare(
  config: KTOConfig, actors: Actors, params: Params, reference: Params | None, batch: Ratings
) -> ReferencedRatings:
  """Adds the batch's reference point."""
  del config
  assert reference is not None
  point = reference_point(actors, params, reference, batch)
  return ReferencedRatings(batch, jnp.full(batch.score.shape, point))


def loss(config: KTOConfig, actors: Actors, params: Params, batch: ReferencedRatings) -> LossOutput:
  """KTO loss, mean over responses that were rated above or below the threshold."""
  ratings = batch.ratings
  assert ratings.reference_logprobs is not None, 'the recipe scores batches with the reference'
  mask = ratings.sequences.response_mask
  logprobs = response_logprobs(actors, params, ratings.sequences)
  logratios = masked_sum(logprobs - ratings.reference_logprobs, mask, axis=-1)
  desirable = ratings.score > config.threshold
  undesirable = ratings.score < config.threshold
  losses = kto(
    logratios,
    desirable,
    batch.reference_point,
    beta=config.beta,
    desirable_weight=config.desirable_weight,
    undesirable_weight=config.undesirable_weight,
  )
  rewards = config.beta * logratios
  return Mean.of(losses, desirable | undesirable), {
    'desirable_implicit_reward': Mean.of(rewards, desirable),
    'undesirable_implicit_reward': Mean.of(rewards, undesirable),
    'reference_point': Mean.of(batch.reference_point),
    'desirable': Mean.of(desirable),
  }


def demands(config: KTOConfig) -> Demands:
  """The KL is estimated from responses to other prompts of the batch."""
  return Demands(compares_rows=True, prepares='reads')


OBJECTIVE = Objective(
  'kto',
  KTOConfig,
  'ratings',
  loss,
  always,
  prepare=prepare,
  unlearnable=unlearnable,
  demands=demands,
)
