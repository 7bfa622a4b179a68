"""A-LoL: policy gradients on given responses that are better than the reference's own."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.common.checks import check_float, check_shapes
from rlhf_jax.common.errors import ConfigError, DataError
from rlhf_jax.common.masked import masked_sum
from rlhf_jax.common.metrics import Mean, Metrics
from rlhf_jax.common.types import Ratings
from rlhf_jax.objectives.base import (
  Actors,
  Curated,
  LossOutput,
  Objective,
  Params,
  check_unread,
  response_logprobs,
)
from rlhf_jax.objectives.policy_gradient import MAX_LOG_RATIO

Array = jax.Array

VARIANTS = ('sequence', 'token', 'reference_free', 'kl')


@dataclasses.dataclass(kw_only=True)
class ALoLConfig:
  """Advantage leftover lunch (Baheti et al. 2024)."""

  # The importance weight: 'sequence', pi / pi_ref of the whole response (A-LoL); 'token', of each
  # token (A-LoL seq.); 'reference_free', 1; 'kl', 1, with a KL penalty in its place (A-LoL KL).
  variant: str = 'sequence'
  # Importance weights are cut to 1 +- clip (0.9 in the released code).
  clip: float = 0.9
  # Weight of the penalty; 'kl' only (`kl_beta` in the released code, 0 by default there).
  kl_coefficient: float = 0.1
  # How rows are drawn: in proportion to their 'advantage' (the paper), or each once an epoch,
  # 'uniform'. Either way only rows of positive advantage are drawn, and each counts by it.
  sampling: str = 'advantage'

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    for name, kinds in (('variant', VARIANTS), ('sampling', ('advantage', 'uniform'))):
      if getattr(self, name) not in kinds:
        raise ConfigError(f'{path}.{name}', getattr(self, name), f'one of {kinds}')
    for name in ('clip', 'kl_coefficient'):
      if not getattr(self, name) > 0:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'a number > 0')
    others = {'kl': ('clip',), 'reference_free': ('clip', 'kl_coefficient')}
    unread = others.get(self.variant, ('kl_coefficient',))
    check_unread(self, path, unread, f'with variant {self.variant!r}')


def curate(config: ALoLConfig, scores: np.ndarray, baselines: Callable[[], np.ndarray]) -> Curated:
  """Advantages A = R(x, y) - V_ref(x) in the place of scores; rows without a positive one go.

  (Baheti et al. 2024, section 3.2.) Raises DataError if no row is left.
  """
  advantages = scores - baselines()
  keep = advantages > 0
  if not keep.any():
    raise DataError(
      'no response has a positive advantage: all ratings are below what the reference is '
      'expected to get. Scores that are all alike teach nothing.'
    )
  drawn = np.where(keep, advantages, 0.0) if config.sampling == 'advantage' else None
  return Curated(advantages, keep, drawn)


def alol(
  logprobs: Array,
  reference_logprobs: Array | None,
  mask: Array,
  advantages: Array,
  *,
  variant: str,
  clip: float,
  kl_coefficient: float,
) -> Array:
  """Loss of responses, `[B]` float32 (Baheti et al. 2024, eq. 4 and section 3.3).

    sequence        -A clip(rho) sum_t log pi_t,   rho = pi(y|x) / pi_ref(y|x)
    token           -A sum_t clip(rho_t) log pi_t
    reference_free  -A sum_t log pi_t
    kl              -A sum_t log pi_t + kl_coefficient (log pi(y|x) - log pi_ref(y|x))

  No gradient flows through rho, nor does it stop where rho is clipped (unlike PPO's surrogate).

  Args:
    logprobs: `[B, R]` float, of the response tokens.
    reference_logprobs: the same under the reference; None for 'reference_free'.
    mask: `[B, R]` bool.
    advantages: `[B]` float.
    variant: see above.
    clip: weights are cut to 1 +- clip.
    kl_coefficient: see above.
  """
  check_shapes('logprobs:BR mask:BR A:B', logprobs=logprobs, mask=mask, A=advantages)
  check_float(logprobs=logprobs, A=advantages)
  logprobs = jnp.where(mask, logprobs, 0.0).astype(jnp.float32)
  if variant == 'reference_free':
    return -advantages * logprobs.sum(-1)
  assert reference_logprobs is not None, 'the recipe scores batches with the reference'
  logratio = jnp.where(mask, logprobs - reference_logprobs, 0.0)
  if variant == 'kl':
    return -advantages * logprobs.sum(-1) + kl_coefficient * logratio.sum(-1)
  if variant not in ('sequence', 'token'):
    raise ValueError(f'variant {variant!r}: expected one of {VARIANTS}.')
  if variant == 'sequence':
    logratio = logratio.sum(-1, keepdims=True)
  rho = jnp.exp(jnp.minimum(jax.lax.stop_gradient(logratio), MAX_LOG_RATIO))
  return -advantages * (jnp.clip(rho, 1 - clip, 1 + clip) * logprobs).sum(-1)


def loss(config: ALoLConfig, actors: Actors, params: Params, batch: Ratings) -> LossOutput:
  """A-LoL loss, mean over responses; `batch.score` holds the advantages."""
  mask = batch.sequences.response_mask
  logprobs = response_logprobs(actors, params, batch.sequences)
  losses = alol(
    logprobs,
    batch.reference_logprobs,
    mask,
    batch.score,
    variant=config.variant,
    clip=config.clip,
    kl_coefficient=config.kl_coefficient,
  )
  metrics: Metrics = {
    'advantage': Mean.of(batch.score),
    'logprob': Mean.of(masked_sum(logprobs, mask, axis=-1)),
  }
  if config.variant != 'reference_free':
    assert batch.reference_logprobs is not None
    logratio = masked_sum(logprobs - batch.reference_logprobs, mask, axis=-1)
    metrics['log_importance'] = Mean.of(logratio)
  return Mean.of(losses), metrics


OBJECTIVE = Objective(
  'alol',
  ALoLConfig,
  'ratings',
  loss,
  lambda config: config.variant != 'reference_free',
  curate=curate,
)
