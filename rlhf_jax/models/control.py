"""What control learns beside a policy: rewards, and the values of states and actions."""

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.common.types import QOutput
from rlhf_jax.models import gaussian, mlp
from rlhf_jax.models.gaussian import GaussianPolicyConfig

Array = jax.Array
Params = dict[str, Any]


def init_reward(config: GaussianPolicyConfig, key: Array) -> Params:
  """r(s, a), parameters of `step_rewards`."""
  sizes = (config.state_size + config.action_size, *config.value_hidden, 1)
  return mlp.init_mlp(key, sizes)


def step_rewards(config: GaussianPolicyConfig, params: Params, segments: Any) -> Array:
  """r(s, a) of every step of `Segments`, `[..., T]` float32."""
  both = jnp.concatenate([segments.states, segments.actions], axis=-1)
  return mlp.mlp(params, both, config.activation)[..., 0]


def init_heads(config: GaussianPolicyConfig, key: Array) -> Params:
  """`{'v', 'q'}`: V(s), and two Q(s, a)."""
  v_key, q_key = jax.random.split(key)
  sizes = (config.state_size, config.action_size)
  return {
    'v': mlp.init_values(v_key, sizes[0], config.value_hidden),
    'q': mlp.init_twin_q(q_key, *sizes, config.value_hidden),
  }


def target_of(heads: Params) -> Params:
  """The part of the heads that has a slow copy."""
  return {'q': heads['q']}


def q_output(
  config: GaussianPolicyConfig, params: Params, heads: Params, target: Params, segments: Any
) -> QOutput:
  """What policy and heads say of segments, `[B, T]` float32 each.

  The last step's `next_values` are 0: its successor is not in the segment.
  """
  states, actions = segments.states, segments.actions
  values = mlp.values(heads['v'], states, config.activation)
  slow = mlp.twin_q(target['q'], states, actions, config.activation)
  return QOutput(
    logprobs=gaussian.log_probs(config, params, states, actions),
    values=values,
    next_values=jnp.concatenate([values[:, 1:], jnp.zeros_like(values[:, :1])], axis=1),
    q=mlp.twin_q(heads['q'], states, actions, config.activation),
    target_q=jax.lax.stop_gradient(slow.min(0)),
  )
