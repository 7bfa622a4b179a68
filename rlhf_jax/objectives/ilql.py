"""ILQL: offline Q-learning on given responses, and a policy tilted by what it learns."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.masked import last_true, masked_sum
from rlhf_jax.common.metrics import Mean
from rlhf_jax.common.types import QOutput, Ratings
from rlhf_jax.objectives.base import (
  Actors,
  Curated,
  Demands,
  LossOutput,
  Objective,
  Params,
  QLearning,
)
from rlhf_jax.objectives.iql import expectile_loss

Array = jax.Array


@dataclasses.dataclass(kw_only=True)
class ILQLConfig:
  """Implicit language Q-learning (Snell et al. 2023); defaults as in trlx."""

  # Discount of a token (0.99 in trlx).
  gamma: float = 0.99
  # V is this expectile of Q over the data's actions (0.7 in trlx).
  expectile: float = 0.7
  # Weight of the conservative term, the cross-entropy of the data's tokens under softmax(Q)
  # (0.1 in trlx).
  cql_coefficient: float = 0.1
  # Weight of the policy's own log-likelihood term, and the inverse temperature of its weights
  # exp(beta (Q - V)); 0 is plain imitation (Nair et al. 2020; 1 and 0 in trlx).
  awac_coefficient: float = 1.0
  awac_beta: float = 0.0
  # How far the slow copies of Q move towards Q in an update (Kostrikov et al. 2021; trlx moves by
  # 0.001 every 5 updates).
  target_rate: float = 0.005
  # Strength of the tilt when responses are sampled: log pi + beta (Q - V) (1 in trlx).
  decode_beta: float = 1.0
  # Scores are brought to mean 0 and standard deviation 1 over the dataset, as in trlx (whose
  # deviation is of the count less one).
  whiten_scores: bool = True

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if not 0 < self.gamma <= 1:
      raise ConfigError(f'{path}.gamma', self.gamma, 'a number in (0, 1]')
    for name in ('expectile', 'target_rate'):
      if not 0 < getattr(self, name) < 1:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'a number in (0, 1)')
    for name in ('cql_coefficient', 'awac_coefficient', 'awac_beta', 'decode_beta'):
      if not getattr(self, name) >= 0:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'a number >= 0')


def curate(config: ILQLConfig, scores: np.ndarray, baselines: Callable[[], np.ndarray]) -> Curated:
  """Every row, its score standardised over the dataset where asked for."""
  del baselines
  if config.whiten_scores:
    # Of equal scores, or of one, nothing is left.
    deviation = scores.std(ddof=1) if len(scores) > 1 else 0.0
    scores = (scores - scores.mean()) / max(float(deviation), 1e-8)
  return Curated(scores, np.ones(len(scores), bool))


def ilql(config: ILQLConfig, output: QOutput, rewards: Array, mask: Array) -> dict[str, Array]:
  """The terms of the loss, `[B, R]` float32 each (Snell et al. 2023, section 4; trlx's form).

    q     sum over both Q of (Q(s, a) - r - gamma V(s'))^2
    v     expectile loss of min target Q(s, a) - V(s)
    cql   sum over both Q of -log softmax(Q(s, .))_a
    awac  -exp(beta (min target Q - V)) log pi(a | s)

  No gradient flows through V(s') nor through the weights.

  Args:
    config: the objective's settings.
    output: what policy and heads say of the responses.
    rewards: `[B, R]` float, paid at each token.
    mask: `[B, R]` bool.
  """
  cleaned: dict[str, Array] = {
    name: jnp.where(mask, value, 0.0).astype(jnp.float32) for name, value in vars(output).items()
  }
  target_q = jax.lax.stop_gradient(cleaned['target_q'])
  goal = rewards + config.gamma * jax.lax.stop_gradient(cleaned['next_values'])
  advantages = target_q - cleaned['values']
  weights = jax.lax.stop_gradient(jnp.exp(jnp.minimum(config.awac_beta * advantages, 40.0)))
  return {
    'q': jnp.square(cleaned['q'] - goal).sum(0),
    'v': expectile_loss(advantages, config.expectile),
    'cql': cleaned['q_nll'].sum(0),
    'awac': -weights * cleaned['logprobs'],
  }


def loss(config: ILQLConfig, actors: Actors, params: Params, batch: Ratings) -> LossOutput:
  """q + v + cql_coefficient cql + awac_coefficient awac, mean over response tokens.

  A response's score is paid at its last token.
  """
  mask = batch.sequences.response_mask
  assert actors.q is not None
  output = actors.q(params, batch.sequences)
  ends = jnp.arange(mask.shape[-1]) == last_true(mask)[:, None]
  rewards = jnp.where(ends, batch.score[:, None], 0.0).astype(jnp.float32)
  terms = ilql(config, output, rewards, mask)
  total = (
    terms['q']
    + terms['v']
    + config.cql_coefficient * terms['cql']
    + config.awac_coefficient * terms['awac']
  )
  mean = Mean(masked_sum(total, mask), mask.sum().astype(jnp.float32))
  return mean, {
    **{f'{name}_loss': Mean.of(term, mask) for name, term in terms.items()},
    'q': Mean.of(output.q.mean(0), mask),
    'values': Mean.of(output.values, mask),
    'target_q': Mean.of(output.target_q, mask),
    'nll': Mean.of(-output.logprobs, mask),
  }


def demands(config: ILQLConfig) -> Demands:
  """Q and V heads, and slow copies of Q."""
  return Demands(q=QLearning(config.target_rate, config.decode_beta))


OBJECTIVE = Objective(
  'ilql',
  ILQLConfig,
  'ratings',
  loss,
  curate=curate,
  demands=demands,
)
