"""Direct preference optimisation and its closest relatives."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import check_float, check_shapes
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.masked import masked_mean, masked_sum
from rlhf_jax.common.metrics import Mean
from rlhf_jax.common.types import Pairs
from rlhf_jax.objectives.base import (
  Actors,
  Demands,
  LossOutput,
  Objective,
  Params,
  always,
  pair_logprobs,
)
from rlhf_jax.objectives.imitation import check_normalization, count_preferred, preferred_nll
from rlhf_jax.objectives.reward_model import preference_metrics

Array = jax.Array

VARIANTS = ('sigmoid', 'robust', 'ipo', 'hinge')


@dataclasses.dataclass(kw_only=True)
class DPOConfig:
  """Direct preference optimisation (Rafailov et al. 2023)."""

  # Strength of the tie to the reference (0.1 in the released code's dialogue recipe).
  beta: float = 0.1
  # 'sigmoid': DPO, with label smoothing cDPO; 'robust': the unbiased noisy-label loss of Chowdhury
  # et al. 2024; 'ipo': Azar et al. 2023; 'hinge': SLiC on log-ratios (Zhao et al. 2023).
  variant: str = 'sigmoid'
  # Assumed probability that a label is flipped, in [0, 0.5); 'sigmoid' and 'robust' only.
  label_smoothing: float = 0.0
  # How token log-ratios become a response's: 'sum' (the papers and the DPO authors' code) or 'mean'
  # over its tokens (TRL's IPO).
  reduction: str = 'sum'
  # Weight of the chosen response's mean token negative log-likelihood (Pang et al. 2024);
  # of a tie, both responses' mean.
  nll_coefficient: float = 0.0
  # What that term is divided by: 'response', each response's tokens, then the mean over responses;
  # 'token', all chosen tokens of the batch, so that long responses weigh more (TRL's 'sft' loss
  # beside another).
  nll_normalization: str = 'response'
  # 'online': the reference scores each batch; 'cached': it scores the whole dataset once, before
  # the first step. Same numbers, same order of data.
  reference: str = 'online'

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if not self.beta > 0:
      raise ConfigError(f'{path}.beta', self.beta, 'a number > 0')
    for name, kinds in (
      ('variant', VARIANTS),
      ('reduction', ('sum', 'mean')),
      ('reference', ('online', 'cached')),
    ):
      if getattr(self, name) not in kinds:
        raise ConfigError(f'{path}.{name}', getattr(self, name), f'one of {kinds}')
    if not 0 <= self.label_smoothing < 0.5:
      raise ConfigError(f'{path}.label_smoothing', self.label_smoothing, 'a number in [0, 0.5)')
    if self.label_smoothing > 0 and self.variant in ('ipo', 'hinge'):
      raise ConfigError(
        f'{path}.label_smoothing',
        self.label_smoothing,
        f'0 with variant {self.variant!r}',
        "Label smoothing is defined for 'sigmoid' and 'robust'.",
      )
    if not self.nll_coefficient >= 0:
      raise ConfigError(f'{path}.nll_coefficient', self.nll_coefficient, 'a number >= 0')
    check_normalization(path, 'nll_normalization', self.nll_normalization)


def dpo(
  logratios: Array,
  preference: Array,
  *,
  beta: float,
  variant: str = 'sigmoid',
  label_smoothing: float = 0.0,
) -> Array:
  """Loss of comparisons, given the log-ratios log pi(y|x) / pi_ref(y|x) of their two responses.

  With h = logratio_chosen - logratio_rejected and e = `label_smoothing`:

    sigmoid  -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)    Rafailov 2023 eq. 7; cDPO
    robust   [-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1 - 2 e)
                                                                      Chowdhury 2024 eq. 12
    ipo      (h - 1 / (2 beta))^2                                     Azar 2023 eq. 17
    hinge    max(0, 1 - beta h)                                       Zhao 2023

  A label of probability p mixes the losses of both verdicts: p loss(h) + (1 - p) loss(-h).

  Args:
    logratios: `[B, 2]` float, chosen first.
    preference: `[B]` probability that the first is preferred.
    beta: strength of the tie to the reference.
    variant: see above.
    label_smoothing: e.

  Returns:
    `[B]` float32.
  """
  check_shapes('logratios:B2 preference:B', logratios=logratios, preference=preference)
  check_float(logratios=logratios, preference=preference)
  logratios = logratios.astype(jnp.float32)
  difference = logratios[:, 0] - logratios[:, 1]

  def verdict(h: Array) -> Array:
    win, lose = jax.nn.log_sigmoid(beta * h), jax.nn.log_sigmoid(-beta * h)
    if variant == 'sigmoid':
      return -(1 - label_smoothing) * win - label_smoothing * lose
    if variant == 'robust':
      return (-(1 - label_smoothing) * win + label_smoothing * lose) / (1 - 2 * label_smoothing)
    if variant == 'ipo':
      return jnp.square(h - 1 / (2 * beta))
    if variant == 'hinge':
      return jax.nn.relu(1 - beta * h)
    raise ValueError(f'variant {variant!r}: expected one of {VARIANTS}.')

  return preference * verdict(difference) + (1 - preference) * verdict(-difference)


def reduced_logratios(config: DPOConfig, logprobs: Array, batch: Pairs) -> Array:
  """Log-ratios to the reference, summed or averaged over tokens: `[B, 2, R] -> [B, 2]`."""
  mask = batch.sequences.response_mask
  assert batch.reference_logprobs is not None, 'the recipe scores batches with the reference'
  check_shapes(
    'mask:B2R logprobs:B2R reference:B2R',
    mask=mask,
    logprobs=logprobs,
    reference=batch.reference_logprobs,
  )
  reduce = masked_mean if config.reduction == 'mean' else masked_sum
  return reduce(logprobs - batch.reference_logprobs, mask, axis=-1)


def loss(config: DPOConfig, actors: Actors, params: Params, batch: Pairs) -> LossOutput:
  """DPO loss, mean over comparisons; `batch.reference_logprobs` must be filled in."""
  mask = batch.sequences.response_mask
  logprobs = pair_logprobs(actors, params, batch)
  logratios = reduced_logratios(config, logprobs, batch)
  losses = dpo(
    logratios,
    batch.preference,
    beta=config.beta,
    variant=config.variant,
    label_smoothing=config.label_smoothing,
  )
  nll = preferred_nll(config.nll_normalization, logprobs, mask, batch)
  mean = Mean.of(losses + config.nll_coefficient * nll)
  totals = masked_sum(logprobs, mask, axis=-1)
  rewards = config.beta * logratios
  margin = rewards[:, 0] - rewards[:, 1]
  return mean, {
    'accuracy': preference_metrics(margin, batch.preference)['accuracy'],
    'implicit_reward_margin': Mean.of(margin),
    'chosen_implicit_reward': Mean.of(rewards[:, 0]),
    'rejected_implicit_reward': Mean.of(rewards[:, 1]),
    'chosen_logprob': Mean.of(totals[:, 0]),
    'rejected_logprob': Mean.of(totals[:, 1]),
    'chosen_nll': Mean.of(nll),
  }


def difference(config: DPOConfig, actors: Actors, params: Params, batch: Pairs) -> Array:
  """`[B]` difference of the implicit rewards beta log pi / pi_ref (Rafailov et al. 2023, eq. 5)."""
  rewards = config.beta * reduced_logratios(config, pair_logprobs(actors, params, batch), batch)
  return rewards[:, 0] - rewards[:, 1]


def demands(config: DPOConfig) -> Demands:
  """Who scores the dataset, and when; a mean over tokens needs their number in the whole batch."""
  return Demands(
    cached_reference=config.reference == 'cached',
    prepares='counts' if config.nll_normalization == 'token' else 'nothing',
  )


OBJECTIVE = Objective(
  'dpo',
  DPOConfig,
  'comparisons',
  loss,
  always,
  difference,
  count_preferred,
  demands=demands,
  domains=('text', 'control'),
)
