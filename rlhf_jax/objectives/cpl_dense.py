"""Dense contrastive preference learning: all ordered pairs of ranked segments."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import check_float, check_shapes
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.masked import masked_mean
from rlhf_jax.common.metrics import Mean
from rlhf_jax.common.types import Rankings
from rlhf_jax.objectives.base import Actors, LossOutput, Objective, Params, response_logprobs
from rlhf_jax.ops.advantages import discounted_sum

Array = jax.Array


@dataclasses.dataclass(kw_only=True)
class DenseCPLConfig:
  """Contrastive preference learning on rankings (Hejna et al. 2023, released code)."""

  # As in `CPLConfig`.
  alpha: float = 0.1
  lam: float = 0.5
  gamma: float = 1.0
  # Weight of a behaviour-cloning term on all segments.
  bc_coefficient: float = 0.0
  # CPL-KL, as in `CPLConfig`.
  use_reference: bool = False

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if not self.alpha > 0:
      raise ConfigError(f'{path}.alpha', self.alpha, 'a number > 0')
    for name in ('lam', 'gamma'):
      if not 0 < getattr(self, name) <= 1:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'a number in (0, 1]')
    if not self.bc_coefficient >= 0:
      raise ConfigError(f'{path}.bc_coefficient', self.bc_coefficient, 'a number >= 0')


def dense_cpl(scores: Array, rank: Array, mask: Array, *, lam: float) -> tuple[Array, Array]:
  """CPL loss of every ordered pair of a ranking's segments.

    -log sigmoid(S_i - lam S_j)   where rank_i < rank_j

  Args:
    scores: `[B, K]` float, S of each segment.
    rank: `[B, K]`, the lower the better; pairs of equal rank are left out.
    mask: `[B, K]` bool, which segments there are.
    lam: in (0, 1].

  Returns:
    `[B, K, K]` float32 losses, the better segment first, and `[B, K, K]` bool, which pairs count.
  """
  check_shapes('scores:BK rank:BK mask:BK', scores=scores, rank=rank, mask=mask)
  check_float(scores=scores)
  scores = jnp.where(mask, scores, 0.0).astype(jnp.float32)
  ordered = mask[:, :, None] & mask[:, None, :] & (rank[:, :, None] < rank[:, None, :])
  return -jax.nn.log_sigmoid(scores[:, :, None] - lam * scores[:, None, :]), ordered


def loss(config: DenseCPLConfig, actors: Actors, params: Params, batch: Rankings) -> LossOutput:
  """Mean over all ordered pairs, plus the behaviour-cloning term, which is weighed like the pairs.

  That term is the mean over a ranking's segments of their mean token negative log-likelihood.
  """
  return loss_of(config, response_logprobs(actors, params, batch.sequences), batch)


def loss_of(config: DenseCPLConfig, logprobs: Array, batch: Rankings) -> LossOutput:
  """That loss, given the segments' log-probs `[B, K, R]`."""
  response_mask = batch.sequences.response_mask
  terms = logprobs
  if config.use_reference:
    assert batch.reference_logprobs is not None, 'the recipe scores batches with the reference'
    terms = logprobs - batch.reference_logprobs
  scores = config.alpha * discounted_sum(terms, response_mask, config.gamma)
  losses, ordered = dense_cpl(scores, batch.rank, batch.mask, lam=config.lam)
  nll = masked_mean(-masked_mean(logprobs, response_mask, axis=-1), batch.mask, axis=-1)
  difference = scores[:, :, None] - scores[:, None, :]
  mean = Mean.of(losses + config.bc_coefficient * nll[:, None, None], ordered)
  return mean, {
    'pair_accuracy': Mean.of(0.5 * (jnp.sign(difference) + 1), ordered),
    'score': Mean.of(scores, batch.mask),
    'bc_nll': Mean.of(nll),
  }


OBJECTIVE = Objective(
  'cpl_dense',
  DenseCPLConfig,
  'rankings',
  loss,
  lambda config: config.use_reference,
  domains=('text', 'control'),
)
