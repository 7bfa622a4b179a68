"""Implicit Q-learning on segments of control; with rewards learnt from preferences, P-IQL.

Kostrikov et al. 2021, element by element:

    L_V   = L2_tau(min_i Qbar_i(s, a) - V(s))                            eq. 5
    L_Q   = sum_i (r + gamma (1 - done) V(s') - Q_i(s, a))^2             eq. 6
    L_pi  = -min(exp(beta (min_i Qbar_i(s, a) - V(s))), 100) log pi(a | s)   eq. 7

with L2_tau of `expectile_loss`, and Qbar the slow copies of Q. Each loss trains only what it is
named after: all else is a constant of it.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import check_float
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.metrics import Mean
from rlhf_jax.common.types import StepRatings
from rlhf_jax.objectives.base import Actors, Demands, LossOutput, Objective, Params, QLearning

Array = jax.Array


@dataclasses.dataclass(kw_only=True)
class IQLConfig:
  """Implicit Q-learning; the defaults are those of P-IQL in Hejna et al. 2023's released code.

  Rewards are those of the stage's reward model (P-IQL), or the task's own where it names none.
  """

  # Discount of a step (0.99 in Hejna et al. 2023, released code).
  gamma: float = 0.99
  # V is this expectile of Q over the data's actions (0.7 in Hejna et al. 2023, released code).
  expectile: float = 0.7
  # Inverse temperature of the weights exp(beta (Q - V)), and where they are cut (3 and
  # 100 in Hejna et al. 2023, released code).
  temperature: float = 3.0
  max_weight: float = 100.0
  # How far the slow copies of Q move towards Q in an update (0.005 in Hejna et al. 2023,
  # released code).
  target_rate: float = 0.005

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if not 0 < self.gamma <= 1:
      raise ConfigError(f'{path}.gamma', self.gamma, 'a number in (0, 1]')
    for name in ('expectile', 'target_rate'):
      if not 0 < getattr(self, name) < 1:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'a number in (0, 1)')
    if not self.temperature >= 0:
      raise ConfigError(f'{path}.temperature', self.temperature, 'a number >= 0')
    if not self.max_weight >= 1:
      raise ConfigError(f'{path}.max_weight', self.max_weight, 'a number >= 1')


def expectile_loss(difference: Array, expectile: float) -> Array:
  """|tau - 1(u < 0)| u^2 (section 4.1), least in the mean where u is a variable less its expectile.

  Args:
    difference: `[...]` float, u.
    expectile: tau in (0, 1); 0.5 is half the squared error, towards 1 it leans to the maximum.

  Returns:
    `[...]` float32.
  """
  check_float(difference=difference)
  difference = difference.astype(jnp.float32)
  weight = jnp.where(difference < 0, 1 - expectile, expectile)
  return weight * jnp.square(difference)


def value_loss(values: Array, target_q: Array, *, expectile: float) -> Array:
  """V is regressed to an upper expectile of Q over the actions in the data (eq. 5).

  Args:
    values: `[...]` float, V(s).
    target_q: `[...]` float, the smaller of the slow copies of Q at (s, a); a constant.
    expectile: tau of `expectile_loss` (0.7 for locomotion, 0.9 for mazes).

  Returns:
    `[...]` float32.
  """
  check_float(values=values, target_q=target_q)
  constant = jax.lax.stop_gradient(target_q.astype(jnp.float32))
  return expectile_loss(constant - values.astype(jnp.float32), expectile)


def q_loss(q: Array, rewards: Array, next_values: Array, not_done: Array, *, gamma: float) -> Array:
  """Every Q is regressed to the value of what followed (eq. 6), the errors of several Q summed.

  Args:
    q: `[K, ...]` float, K functions Q(s, a); the released code has two.
    rewards: `[...]` float.
    next_values: `[...]` float, V(s'); a constant, and not read where all was over.
    not_done: `[...]` bool, False where s' is terminal.
    gamma: discount in [0, 1].

  Returns:
    `[...]` float32.
  """
  check_float(q=q, rewards=rewards, next_values=next_values)
  following = jnp.where(not_done, next_values, 0.0).astype(jnp.float32)
  target = jax.lax.stop_gradient(rewards.astype(jnp.float32) + gamma * following)
  return jnp.square(target - q.astype(jnp.float32)).sum(0)


def advantage_weights(
  target_q: Array, values: Array, *, temperature: float, max_weight: float = 100.0
) -> Array:
  """min(exp(beta (Q - V)), max_weight), `[...]` float32 without gradient; never overflows."""
  check_float(target_q=target_q, values=values)
  advantage = target_q.astype(jnp.float32) - values.astype(jnp.float32)
  exponent = jnp.minimum(temperature * advantage, math.log(max_weight))
  return jax.lax.stop_gradient(jnp.exp(exponent))


def policy_loss(
  logprobs: Array,
  target_q: Array,
  values: Array,
  *,
  temperature: float,
  max_weight: float = 100.0,
) -> Array:
  """Advantage-weighted regression: actions are imitated the more, the better they are (eq. 7).

  Args:
    logprobs: `[...]` float, log pi(a | s).
    target_q: `[...]` float, the smaller of the slow copies of Q at (s, a); a constant.
    values: `[...]` float, V(s); a constant.
    temperature: beta >= 0, an inverse temperature; 0 is behaviour cloning (3 for locomotion, 10 for
      mazes).
    max_weight: where the weights are cut (100 in the released code).

  Returns:
    `[...]` float32.
  """
  check_float(logprobs=logprobs)
  weights = advantage_weights(target_q, values, temperature=temperature, max_weight=max_weight)
  return -weights * logprobs.astype(jnp.float32)


def loss(config: IQLConfig, actors: Actors, params: Params, batch: StepRatings) -> LossOutput:
  """The sum of the three losses, mean over steps that have a successor in their segment.

  `batch.score` holds the rewards, and `batch.score_mask` says which steps have a successor: what
  comes after a segment's last step is not known, so nothing is learnt from it.
  """
  mask = batch.score_mask
  assert actors.q is not None
  # Masked first: elsewhere anything may stand, and must not make nan in the gradient.
  output = jax.tree.map(lambda x: jnp.where(mask, x, 0.0), actors.q(params, batch.sequences))
  rewards = jnp.where(mask, batch.score, 0.0)
  weighing = {'temperature': config.temperature, 'max_weight': config.max_weight}
  terms = {
    'v': value_loss(output.values, output.target_q, expectile=config.expectile),
    'q': q_loss(output.q, rewards, output.next_values, mask, gamma=config.gamma),
    'policy': policy_loss(output.logprobs, output.target_q, output.values, **weighing),
  }
  weights = advantage_weights(output.target_q, output.values, **weighing)
  return Mean.of(terms['v'] + terms['q'] + terms['policy'], mask), {
    **{f'{name}_loss': Mean.of(term, mask) for name, term in terms.items()},
    'values': Mean.of(output.values, mask),
    'weight': Mean.of(weights, mask),
    'reward': Mean.of(rewards, mask),
  }


def demands(config: IQLConfig) -> Demands:
  """Q and V beside the policy, and slow copies of Q."""
  return Demands(q=QLearning(config.target_rate))


OBJECTIVE = Objective(
  'iql',
  IQLConfig,
  'step_ratings',
  loss,
  demands=demands,
  domains=('control',),
)
