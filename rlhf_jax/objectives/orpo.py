"""ORPO: supervised fine-tuning with a penalty on the odds of rejected responses."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import check_float, check_shapes
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.masked import masked_mean
from rlhf_jax.common.metrics import Mean
from rlhf_jax.common.types import Pairs
from rlhf_jax.objectives.base import (
  Actors,
  Demands,
  LossOutput,
  Objective,
  Params,
  pair_logprobs,
  response_logprobs,
)
from rlhf_jax.objectives.imitation import (
  as_responses,
  check_normalization,
  preferred,
  preferred_nll,
  with_imitated_tokens,
)
from rlhf_jax.objectives.reward_model import preference_metrics

Array = jax.Array

# A mean log-prob of 0 has infinite odds.
MAX_MEAN_LOGPROB = -1e-6


@dataclasses.dataclass(kw_only=True)
class ORPOConfig:
  """Odds ratio preference optimisation (Hong et al. 2024); it needs no SFT stage before it."""

  # Weight of the odds-ratio term (lambda; 0.1 for Mistral-ORPO-beta, and in TRL, where it is beta;
  # the released code's own default is 1).
  lam: float = 0.1
  # What the likelihood term is divided by: 'response', each response's tokens, then the mean over
  # responses; 'token', all imitated tokens of the batch, so that long responses weigh more (the
  # released code and TRL).
  nll_normalization: str = 'response'
  # Whether that term imitates the prompt too, all of it but its first token (TRL always; the
  # released code without --disable_prompt_loss). The odds are of responses alone.
  prompt_nll: bool = False

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if not self.lam > 0:
      raise ConfigError(f'{path}.lam', self.lam, 'a number > 0')
    check_normalization(path, 'nll_normalization', self.nll_normalization)


def log_odds(means: Array) -> Array:
  """log(p / (1 - p)) of p = exp(mean log-prob of a response's tokens); float32, any shape."""
  check_float(means=means)
  means = jnp.minimum(means.astype(jnp.float32), MAX_MEAN_LOGPROB)
  return means - jnp.log(-jnp.expm1(means))


def orpo(means: Array, preference: Array) -> Array:
  """The odds-ratio term of comparisons, `[B]` float32 (Hong et al. 2024, eq. 7).

    -log sigmoid(log odds_chosen - log odds_rejected)

  Args:
    means: `[B, 2]` float, mean log-prob of the tokens of the chosen and the rejected response.
    preference: `[B]` probability that the first is preferred; both verdicts are mixed.
  """
  check_shapes('means:B2 preference:B', means=means, preference=preference)
  odds = log_odds(means)
  ratio = odds[:, 0] - odds[:, 1]
  return -(preference * jax.nn.log_sigmoid(ratio) + (1 - preference) * jax.nn.log_sigmoid(-ratio))


class Read(NamedTuple):
  """What is said, and imitated, of both texts of a pair.

  Attributes:
    logprobs: `[B, 2, T]` float32, of responses (T = R), or of all tokens but the first.
    response: `[B, 2, T]` bool, the tokens of responses.
    imitated: `[B, 2, T]` bool, what the likelihood term is of.
  """

  logprobs: Array
  response: Array
  imitated: Array


def read(config: ORPOConfig, actors: Actors, params: Params, batch: Pairs) -> Read:
  """One forward pass of both texts of each pair."""
  if not config.prompt_nll:
    mask = batch.sequences.response_mask
    return Read(pair_logprobs(actors, params, batch), mask, mask)
  texts, response = as_responses(batch.sequences)
  return Read(response_logprobs(actors, params, texts), response, texts.response_mask)


def loss(config: ORPOConfig, actors: Actors, params: Params, batch: Pairs) -> LossOutput:
  """NLL of the chosen response plus lam times the odds-ratio term, mean over pairs (eq. 6)."""
  logprobs, response, imitated = read(config, actors, params, batch)
  means = masked_mean(logprobs, response, axis=-1)
  nll = preferred_nll(config.nll_normalization, logprobs, imitated, batch)
  term = orpo(means, batch.preference)
  odds = log_odds(means)
  ratio = odds[:, 0] - odds[:, 1]
  return Mean.of(nll + config.lam * term), {
    'accuracy': preference_metrics(ratio, batch.preference)['accuracy'],
    'log_odds_ratio': Mean.of(ratio),
    'odds_ratio_loss': Mean.of(term),
    'chosen_nll': Mean.of(nll),
  }


def difference(config: ORPOConfig, actors: Actors, params: Params, batch: Pairs) -> Array:
  """`[B]` log odds ratio of the two responses."""
  del config
  odds = log_odds(
    masked_mean(pair_logprobs(actors, params, batch), batch.sequences.response_mask, axis=-1)
  )
  return odds[:, 0] - odds[:, 1]


def prepare(
  config: ORPOConfig, actors: Actors, params: Params, reference: Params | None, batch: Pairs
) -> Pairs:
  """Counts the tokens of the whole batch that are imitated."""
  del actors, params, reference
  mask = batch.sequences.response_mask
  if config.prompt_nll:
    mask = as_responses(batch.sequences)[0].response_mask
  return with_imitated_tokens(batch, preferred(batch.preference)[..., None] & mask)


def demands(config: ORPOConfig) -> Demands:
  """A mean over tokens needs their number in the whole batch."""
  return Demands(prepares='counts' if config.nll_normalization == 'token' else 'nothing')


OBJECTIVE = Objective(
  'orpo',
  ORPOConfig,
  'comparisons',
  loss,
  difference=difference,
  prepare=prepare,
  demands=demands,
)
