"""Contrastive preference learning: the regret model of preferences, without a reward model."""

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
  pair_logprobs,
)
from rlhf_jax.objectives.imitation import (
  check_normalization,
  count_preferred,
  preferred_nll,
  token_nll,
  with_imitated_tokens,
)
from rlhf_jax.objectives.reward_model import preference_metrics
from rlhf_jax.ops.advantages import discounted_sum

Array = jax.Array


@dataclasses.dataclass(kw_only=True)
class CPLConfig:
  """Contrastive preference learning (Hejna et al. 2023).

  The paper clones behaviour before the preference loss: let `policy.init` name an SFT stage with
  `data.responses='all'` (every segment; `configs/sft.py:all`) or `'chosen'`. A stage begins with an
  optimizer and a schedule of its own, and the reference of the KL variant is that stage's result.
  """

  # Temperature of the advantage, alpha log pi (0.1; CPL-KL 0.2 in the released code).
  alpha: float = 0.1
  # Conservative bias in (0, 1]: scales the score of the dispreferred segment (eq. 6; 0.5, CPL-KL
  # 0.75, CPL-BC 1 in the released code). 1 is unbiased.
  lam: float = 0.5
  # Discount within a segment (eq. 5). The released code has none, that is 1.
  gamma: float = 1.0
  # Weight of a behaviour-cloning term (CPL-BC: 1).
  bc_coefficient: float = 0.0
  # Which responses that term imitates: 'all' or 'chosen' (of a tie both).
  bc_responses: str = 'all'
  # What that term is divided by: 'response', each response's tokens, then the mean over responses
  # (of a tie both count half each with 'chosen'); 'token', all imitated tokens of the batch, those
  # of a tie's both responses in full (the released code's `bc_data: pos`, and TRL's CPO).
  bc_normalization: str = 'response'
  # CPL-KL: score log-ratios to the frozen initial policy instead of log-probs.
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
    if self.bc_responses not in ('all', 'chosen'):
      raise ConfigError(f'{path}.bc_responses', self.bc_responses, "'all' or 'chosen'")
    check_normalization(path, 'bc_normalization', self.bc_normalization)


def cpl(scores: Array, preference: Array, *, lam: float) -> Array:
  """Negative log-likelihood of comparisons, biased regret model (Hejna et al. 2023, eq. 6).

    P(+ > -) = exp S+ / (exp S+ + exp(lam S-)),  loss = -log sigmoid(S+ - lam S-)

  lam scales the dispreferred segment. A label of probability p mixes both verdicts.

  Args:
    scores: `[B, 2]` float, S of the chosen and the rejected segment.
    preference: `[B]` probability that the first is preferred.
    lam: in (0, 1].

  Returns:
    `[B]` float32.
  """
  check_shapes('scores:B2 preference:B', scores=scores, preference=preference)
  check_float(scores=scores, preference=preference)
  first, second = scores.astype(jnp.float32).T
  return -(
    preference * jax.nn.log_sigmoid(first - lam * second)
    + (1 - preference) * jax.nn.log_sigmoid(second - lam * first)
  )


def segment_scores(config: CPLConfig, logprobs: Array, batch: Pairs) -> Array:
  """S = sum_t gamma^t alpha log pi(a_t | s_t), or of log-ratios: `[B, 2, R] -> [B, 2]`."""
  mask = batch.sequences.response_mask
  terms = logprobs
  if config.use_reference:
    assert batch.reference_logprobs is not None, 'the recipe scores batches with the reference'
    check_shapes('mask:B2R reference:B2R', mask=mask, reference=batch.reference_logprobs)
    terms = logprobs - batch.reference_logprobs
  return config.alpha * discounted_sum(terms, mask, config.gamma)


def loss(config: CPLConfig, actors: Actors, params: Params, batch: Pairs) -> LossOutput:
  """CPL loss, mean over comparisons.

  For segments of one length both normalizations of the behaviour-cloning term are the released
  code's mean over all actions.
  """
  mask = batch.sequences.response_mask
  logprobs = pair_logprobs(actors, params, batch)
  scores = segment_scores(config, logprobs, batch)
  losses = cpl(scores, batch.preference, lam=config.lam)
  if config.bc_responses == 'chosen':
    cloned = preferred_nll(config.bc_normalization, logprobs, mask, batch)
  elif config.bc_normalization == 'token':
    cloned = token_nll(logprobs, mask, batch)
  else:
    cloned = -masked_mean(logprobs, mask, axis=-1).mean(-1)
  mean = Mean.of(losses + config.bc_coefficient * cloned)
  totals = masked_sum(logprobs, mask, axis=-1)
  return mean, {
    'accuracy': preference_metrics(scores[:, 0] - scores[:, 1], batch.preference)['accuracy'],
    'chosen_score': Mean.of(scores[:, 0]),
    'rejected_score': Mean.of(scores[:, 1]),
    'chosen_logprob': Mean.of(totals[:, 0]),
    'rejected_logprob': Mean.of(totals[:, 1]),
    'bc_nll': Mean.of(cloned),
  }


def difference(config: CPLConfig, actors: Actors, params: Params, batch: Pairs) -> Array:
  """`[B]` difference of the segments' scores, without the conservative bias."""
  scores = segment_scores(config, pair_logprobs(actors, params, batch), batch)
  return scores[:, 0] - scores[:, 1]


def prepare(
  config: CPLConfig, actors: Actors, params: Params, reference: Params | None, batch: Pairs
) -> Pairs:
  """Counts the tokens of the whole batch that are imitated."""
  if config.bc_responses == 'chosen':
    return count_preferred(config, actors, params, reference, batch)
  return with_imitated_tokens(batch, batch.sequences.response_mask)


def demands(config: CPLConfig) -> Demands:
  """A mean over tokens needs their number in the whole batch."""
  return Demands(prepares='counts' if config.bc_normalization == 'token' else 'nothing')


OBJECTIVE = Objective(
  'cpl',
  CPLConfig,
  'comparisons',
  loss,
  lambda config: config.use_reference,
  difference,
  prepare,
  demands=demands,
  domains=('text', 'control'),
)
