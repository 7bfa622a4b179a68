"""A Gaussian policy for control: the mean an MLP of the state, one standard deviation an action."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import ShapeError
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.types import PolicyOutput
from rlhf_jax.models.mlp import ACTIVATIONS, init_mlp, mlp, replicated_axes

Array = jax.Array
Params = dict[str, Any]


@dataclasses.dataclass(kw_only=True)
class GaussianPolicyConfig:
  """pi(a | s) = N(mean(s), std^2); the defaults are a linear policy with CPL's fixed variance."""

  # Numbers in a state and in an action; 0: as many as the data has (filled in when the stage is
  # built).
  state_size: int = 0
  action_size: int = 0
  # Widths of the hidden layers; none: the mean is linear in the state. (512, 512) for Meta-World
  # (Hejna et al. 2023, released code).
  hidden: tuple[int, ...] = ()
  # Between layers: 'relu' (Hejna et al. 2023, released code) or 'tanh'.
  activation: str = 'relu'
  # True: the mean is the tanh of the last layer, for actions in [-1, 1] (as in that code).
  tanh_mean: bool = False
  # Whether layers have a bias; a linear policy without one is a gain, as LQR wants.
  bias: bool = False
  # Standard deviation of every action; of the first step if learned. sqrt(1/2): the log-density is
  # -|mean - a|^2 and a constant (Hejna et al. 2023, released code).
  std: float = math.sqrt(0.5)
  # Whether the standard deviation is a parameter, one an action and the same in all states.
  learned_std: bool = False
  # Hidden layers of what is learnt beside it: reward model, V and Q (the released code's widths are
  # those of the policy).
  value_hidden: tuple[int, ...] = (64, 64)
  # False: the log-density without that constant, as in the same code. It makes no difference where
  # only differences of equally long segments count.
  normalized: bool = True

  def with_sizes(self, state_size: int, action_size: int, path: str) -> 'GaussianPolicyConfig':
    """This policy for data of these sizes; raises ConfigError if it was given others."""
    for name, size in (('state_size', state_size), ('action_size', action_size)):
      if getattr(self, name) not in (0, size):
        raise ConfigError(
          f'{path}.{name}',
          getattr(self, name),
          f'{size}, as the data has',
          f'{path}.{name}=0 takes that number.',
        )
    return dataclasses.replace(self, state_size=state_size, action_size=action_size)

  @property
  def is_linear(self) -> bool:
    """Whether the mean is a matrix times the state."""
    return not (self.hidden or self.bias or self.tanh_mean)

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    for name in ('state_size', 'action_size'):
      if getattr(self, name) < 0:
        raise ConfigError(
          f'{path}.{name}', getattr(self, name), "a positive number, or 0 for the data's"
        )
    for name in ('hidden', 'value_hidden'):
      if any(width < 1 for width in getattr(self, name)):
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'positive widths, or none')
    if self.activation not in ACTIVATIONS:
      raise ConfigError(f'{path}.activation', self.activation, f'one of {tuple(ACTIVATIONS)}')
    if not 0 < self.std < math.inf:
      raise ConfigError(f'{path}.std', self.std, 'a positive finite number')
    if self.learned_std and not self.normalized:
      raise ConfigError(
        f'{path}.normalized',
        False,
        f'True with {path}.learned_std',
        'Without its constant the density grows with the standard deviation, without end.',
      )


def init(config: GaussianPolicyConfig, key: Array) -> Params:
  """Float32 `{'mean': ...}` of `init_mlp`, with `'log_std': [A]` if it is learned.

  Raises ConfigError while the sizes are not known.
  """
  for name in ('state_size', 'action_size'):
    if getattr(config, name) < 1:
      raise ConfigError(
        f'policy.{name}',
        getattr(config, name),
        'a positive number',
        'It must be set, or filled in from the data, before parameters are made.',
      )
  sizes = (config.state_size, *config.hidden, config.action_size)
  params: Params = {'mean': init_mlp(key, sizes, bias=config.bias)}
  if config.learned_std:
    params['log_std'] = jnp.full(config.action_size, math.log(config.std))
  return params


def logical_axes(config: GaussianPolicyConfig) -> Params:
  """The tree of `init` with a tuple of axis names for each parameter; none has one."""
  return replicated_axes(jax.eval_shape(lambda: init(config, jax.random.key(0))))


def mean(config: GaussianPolicyConfig, params: Params, states: Array) -> Array:
  """The most likely actions, `[..., S]` -> `[..., A]` float32."""
  if states.shape[-1] != config.state_size:
    raise ShapeError(
      f'states: expected {config.state_size} numbers a state, got shape {tuple(states.shape)}.'
    )
  actions = mlp(params['mean'], states, config.activation)
  return jnp.tanh(actions) if config.tanh_mean else actions


def log_probs(config: GaussianPolicyConfig, params: Params, states: Array, actions: Array) -> Array:
  """Log-density of actions, in nats.

    log pi(a | s) = -sum_i ((a_i - mean_i)^2 / (2 std_i^2) + log std_i + log(2 pi) / 2)

  the last two terms only if `normalized`.

  Args:
    config: the policy.
    params: from `init`.
    states: `[..., S]` float.
    actions: `[..., A]` float, with the same leading axes.

  Returns:
    `[...]` float32.

  Raises:
    ShapeError: the arrays disagree with the config or each other.
  """
  expected = (*states.shape[:-1], config.action_size)
  if actions.shape != expected:
    raise ShapeError(f'actions: expected shape {expected}, got {tuple(actions.shape)}.')
  log_std = _log_std(config, params)
  scaled = (actions.astype(jnp.float32) - mean(config, params, states)) * jnp.exp(-log_std)
  exponent = -jnp.square(scaled).sum(-1) / 2
  if not config.normalized:
    return exponent
  return exponent - (log_std + math.log(2 * math.pi) / 2).sum()


def entropy(config: GaussianPolicyConfig, params: Params) -> Array:
  """Differential entropy in nats, sum_i log(std_i sqrt(2 pi e)), the same in all states: `[]`."""
  return (_log_std(config, params) + math.log(2 * math.pi * math.e) / 2).sum()


def policy_output(config: GaussianPolicyConfig, params: Params, segments: Any) -> PolicyOutput:
  """What objectives ask of a policy: log-probs and entropies of `Segments`, `[..., T]` float32."""
  logprobs = log_probs(config, params, segments.states, segments.actions)
  return PolicyOutput(
    logprobs=logprobs, entropy=jnp.broadcast_to(entropy(config, params), logprobs.shape)
  )


def gain(config: GaussianPolicyConfig, params: Params) -> Array:
  """`[A, S]`: the matrix of a linear policy, mean = gain s; raises ValueError if it has none."""
  if not config.is_linear:
    raise ValueError('A gain is all of a policy only without hidden layers, bias and tanh_mean.')
  return params['mean']['layer_0']['kernel'].T


def _log_std(config: GaussianPolicyConfig, params: Params) -> Array:
  """`[A]` float32."""
  if config.learned_std:
    return params['log_std']
  return jnp.full(config.action_size, math.log(config.std), jnp.float32)
