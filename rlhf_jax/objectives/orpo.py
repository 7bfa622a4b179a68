"""ORPO: supervised fine-tuning with a penalty on the odds of rejected responses."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import check_float, check_shapes
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.masked import masked_mean
from rlhf_jax.common.metrics import Mean
from rlhf_jax.common.types import Pairs
from rlhf_jax.objectives.base import (
  Actors,
  LossOutput,
  Objective,
  Params,
  of_preferred,
  pair_logprobs,
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

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if not self.lam > 0:
      raise ConfigError(f'{path}.lam', self.lam, 'a number > 0')


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


def loss(config: ORPOConfig, actors: Actors, params: Params, batch: Pairs) -> LossOutput:
  """NLL of the chosen response plus lam times the odds-ratio term, mean over pairs (eq. 6).

  The NLL is the mean over a response's tokens; of a tie both responses' mean. (The released code's
  and TRL's is over the batch's tokens, those of prompts included unless the former is told not to.)
  """
  means = masked_mean(pair_logprobs(actors, params, batch), batch.sequences.response_mask, axis=-1)
  nll = of_preferred(-means, batch.preference)
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


OBJECTIVE = Objective('orpo', ORPOConfig, 'comparisons', loss, difference=difference)
