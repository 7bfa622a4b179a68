"""Unlikelihood: make chosen responses likelier and rejected ones less likely."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.masked import masked_sum
from rlhf_jax.common.metrics import Mean
from rlhf_jax.common.types import Pairs
from rlhf_jax.objectives.base import (
  Actors,
  LossOutput,
  Objective,
  Params,
  pair_logprobs,
)
from rlhf_jax.objectives.reward_model import preference_metrics

Array = jax.Array

# A token of probability 1 has an infinite unlikelihood loss.
MAX_LOGPROB = -1e-6


@dataclasses.dataclass(kw_only=True)
class UnlikelihoodConfig:
  """The unlikelihood baseline of Rafailov et al. 2023 (section 6; Welleck et al. 2020)."""

  # Weight of the unlikelihood term (0.1 is one of those that Rafailov et al. sweep:
  # 0.05, 0.1, 0.5, 1).
  alpha: float = 0.1
  # How a rejected response is made unlikely: 'sequence', by lowering its log-prob (Rafailov et al.;
  # without lower bound, so that long training degenerates), or 'token', by raising log(1 - p) of
  # each of its tokens (Welleck et al. 2020, eq. 4).
  variant: str = 'sequence'

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if not 0 <= self.alpha <= 1:
      raise ConfigError(f'{path}.alpha', self.alpha, 'a number in [0, 1]')
    if self.variant not in ('sequence', 'token'):
      raise ConfigError(f'{path}.variant', self.variant, "'sequence' or 'token'")


def unlikelihood(
  logprobs: Array, mask: Array, preference: Array, *, alpha: float, variant: str
) -> Array:
  """Loss of comparisons, `[B]` float32.

    sequence  -log pi(chosen) + alpha log pi(rejected)
    token     -log pi(chosen) - alpha sum_t log(1 - pi(rejected_t))

  Args:
    logprobs: `[B, 2, R]` float, of the tokens of the chosen and the rejected response.
    mask: `[B, 2, R]` bool.
    preference: `[B]` probability that the first is preferred; both verdicts are mixed.
    alpha: weight of the second term.
    variant: see above.
  """
  likely = -masked_sum(logprobs, mask, axis=-1)
  if variant == 'sequence':
    unlikely = -likely
  elif variant == 'token':
    bounded = jnp.minimum(logprobs.astype(jnp.float32), MAX_LOGPROB)
    safe = jnp.where(mask, bounded, -1.0)  # or masked infinities reach the gradient as nan
    unlikely = masked_sum(-jnp.log(-jnp.expm1(safe)), mask, axis=-1)
  else:
    raise ValueError(f"variant {variant!r}: expected 'sequence' or 'token'.")
  verdicts = likely + alpha * unlikely[:, ::-1]
  return preference * verdicts[:, 0] + (1 - preference) * verdicts[:, 1]


def loss(config: UnlikelihoodConfig, actors: Actors, params: Params, batch: Pairs) -> LossOutput:
  """Unlikelihood loss, mean over comparisons."""
  mask = batch.sequences.response_mask
  logprobs = pair_logprobs(actors, params, batch)
  losses = unlikelihood(
    logprobs, mask, batch.preference, alpha=config.alpha, variant=config.variant
  )
  totals = masked_sum(logprobs, mask, axis=-1)
  return Mean.of(losses), {
    'accuracy': preference_metrics(totals[:, 0] - totals[:, 1], batch.preference)['accuracy'],
    'chosen_logprob': Mean.of(totals[:, 0]),
    'rejected_logprob': Mean.of(totals[:, 1]),
  }


def difference(config: UnlikelihoodConfig, actors: Actors, params: Params, batch: Pairs) -> Array:
  """`[B]` difference of the responses' log-probs."""
  del config
  totals = masked_sum(pair_logprobs(actors, params, batch), batch.sequences.response_mask, axis=-1)
  return totals[:, 0] - totals[:, 1]


OBJECTIVE = Objective(
  'unlikelihood', UnlikelihoodConfig, 'comparisons', loss, difference=difference
)
