"""SimPO: preferences between length-averaged log-probs, without a reference."""

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
  Demands,
  LossOutput,
  Objective,
  Params,
  pair_logprobs,
)
from rlhf_jax.objectives.imitation import check_normalization, count_preferred, preferred_nll
from rlhf_jax.objectives.reward_model import preference_metrics

Array = jax.Array


@dataclasses.dataclass(kw_only=True)
class SimPOConfig:
  """Simple preference optimisation (Meng et al. 2024)."""

  # Scale of the reward, the mean log-prob of a response's tokens (2.0 in the released code).
  beta: float = 2.0
  # Margin by which the preferred reward should win, in the units of beta times log-probs (the
  # released code names its ratio to beta: 0.25 by default, 0.5 in its Llama-3-8B-Base recipe).
  gamma: float = 1.0
  # 'sigmoid', the paper's; 'hinge', max(0, 1 - (difference - gamma)), of the released code.
  variant: str = 'sigmoid'
  # Assumed probability that a label is flipped, in [0, 0.5); 'sigmoid' only.
  label_smoothing: float = 0.0
  # Weight of the chosen response's mean token negative log-likelihood (`sft_weight` in the released
  # code, `cpo_alpha` in TRL).
  nll_coefficient: float = 0.0
  # What that term is divided by: 'response', each response's tokens, then the mean over responses;
  # 'token', all chosen tokens of the batch, so that long responses weigh more (the
  # released code and TRL).
  nll_normalization: str = 'response'

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if not self.beta > 0:
      raise ConfigError(f'{path}.beta', self.beta, 'a number > 0')
    for name in ('gamma', 'nll_coefficient'):
      if not getattr(self, name) >= 0:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'a number >= 0')
    if self.variant not in ('sigmoid', 'hinge'):
      raise ConfigError(f'{path}.variant', self.variant, "'sigmoid' or 'hinge'")
    if not 0 <= self.label_smoothing < 0.5:
      raise ConfigError(f'{path}.label_smoothing', self.label_smoothing, 'a number in [0, 0.5)')
    if self.label_smoothing > 0 and self.variant == 'hinge':
      raise ConfigError(f'{path}.label_smoothing', self.label_smoothing, "0 with variant 'hinge'")
    check_normalization(path, 'nll_normalization', self.nll_normalization)


def simpo(
  means: Array,
  preference: Array,
  *,
  beta: float,
  gamma: float,
  variant: str = 'sigmoid',
  label_smoothing: float = 0.0,
) -> Array:
  """Loss of comparisons (Meng et al. 2024, eq. 6).

    -log sigmoid(beta mean_chosen - beta mean_rejected - gamma)

  A label of probability p mixes the losses of both verdicts, as does label smoothing.

  Args:
    means: `[B, 2]` float, mean log-prob of the tokens of the chosen and the rejected response.
    preference: `[B]` probability that the first is preferred.
    beta: scale of the reward.
    gamma: target margin.
    variant: 'sigmoid' or 'hinge'.
    label_smoothing: see `SimPOConfig`.

  Returns:
    `[B]` float32.
  """
  check_shapes('means:B2 preference:B', means=means, preference=preference)
  check_float(means=means, preference=preference)
  means = means.astype(jnp.float32)
  difference = beta * (means[:, 0] - means[:, 1])

  def verdict(h: Array) -> Array:
    if variant == 'hinge':
      return jax.nn.relu(1 - (h - gamma))
    win, lose = jax.nn.log_sigmoid(h - gamma), jax.nn.log_sigmoid(-(h - gamma))
    return -(1 - label_smoothing) * win - label_smoothing * lose

  return preference * verdict(difference) + (1 - preference) * verdict(-difference)


def loss(config: SimPOConfig, actors: Actors, params: Params, batch: Pairs) -> LossOutput:
  """SimPO loss, mean over comparisons."""
  logprobs, mask = pair_logprobs(actors, params, batch), batch.sequences.response_mask
  means = masked_mean(logprobs, mask, axis=-1)
  losses = simpo(
    means,
    batch.preference,
    beta=config.beta,
    gamma=config.gamma,
    variant=config.variant,
    label_smoothing=config.label_smoothing,
  )
  nll = preferred_nll(config.nll_normalization, logprobs, mask, batch)
  rewards = config.beta * means
  margin = rewards[:, 0] - rewards[:, 1]
  return Mean.of(losses + config.nll_coefficient * nll), {
    'accuracy': preference_metrics(margin, batch.preference)['accuracy'],
    'implicit_reward_margin': Mean.of(margin),
    'chosen_implicit_reward': Mean.of(rewards[:, 0]),
    'rejected_implicit_reward': Mean.of(rewards[:, 1]),
    'chosen_nll': Mean.of(nll),
  }


def difference(config: SimPOConfig, actors: Actors, params: Params, batch: Pairs) -> Array:
  """`[B]` difference of the implicit rewards, beta times mean log-probs."""
  means = masked_mean(pair_logprobs(actors, params, batch), batch.sequences.response_mask, axis=-1)
  return config.beta * (means[:, 0] - means[:, 1])


def demands(config: SimPOConfig) -> Demands:
  """A mean over tokens needs their number in the whole batch."""
  return Demands(prepares='counts' if config.nll_normalization == 'token' else 'nothing')


OBJECTIVE = Objective(
  'simpo',
  SimPOConfig,
  'comparisons',
  loss,
  difference=difference,
  prepare=count_preferred,
  demands=demands,
  domains=('text', 'control'),
)
