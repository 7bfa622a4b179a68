"""Heads for offline Q-learning over tokens: V of a state, and Q of every next token."""

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.common.types import QOutput, Sequences
from rlhf_jax.models import decoder
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.roles import response_states
from rlhf_jax.ops.logprobs import token_logprobs

Array = jax.Array
Params = dict[str, Any]


def _head_init(key: Array, width: int, outputs: int) -> Params:
  """Two layers with 2 width units between, as in trlx. The second is zero: no tilt at the start."""
  return {
    'hidden': {
      'kernel': jax.random.normal(key, (width, 2 * width)) * (2 / width) ** 0.5,
      'bias': jnp.zeros(2 * width),
    },
    'out': {
      'kernel': jnp.zeros((2 * width, outputs)),
      'bias': jnp.zeros(outputs),
    },
  }


def _head_axes(outputs: str | None) -> Params:
  return {
    'hidden': {'kernel': ('embed', 'mlp'), 'bias': ('mlp',)},
    # The units are cut as the residual stream is: 'mlp' and 'vocab' are the same mesh axis.
    'out': {'kernel': ('embed', outputs), 'bias': (outputs,)},
  }


def _head(params: Params, hidden: Array) -> Array:
  hidden = hidden.astype(jnp.float32)
  units = jax.nn.relu(hidden @ params['hidden']['kernel'] + params['hidden']['bias'])
  return units @ params['out']['kernel'] + params['out']['bias']


def q_heads_init(config: ModelConfig, key: Array) -> Params:
  """`{'v', 'q1', 'q2'}` on hidden states of the decoder, float32."""
  keys = jax.random.split(key, 3)
  sizes = {'v': 1, 'q1': config.padded_vocab_size, 'q2': config.padded_vocab_size}
  return {
    name: _head_init(k, config.width, size)
    for (name, size), k in zip(sizes.items(), keys, strict=True)
  }


def q_heads_axes() -> Params:
  """Logical axis names of the heads' parameters."""
  return {'v': _head_axes(None), 'q1': _head_axes('vocab'), 'q2': _head_axes('vocab')}


def target_of(heads: Params) -> Params:
  """The part of the heads that has a slow copy."""
  return {name: heads[name] for name in ('q1', 'q2')}


def q_output(
  config: ModelConfig, params: Params, heads: Params, target: Params, sequences: Sequences
) -> QOutput:
  """What policy and heads say of given responses; all read the policy's hidden states.

  Args:
    config: the decoder.
    params: its parameters.
    heads: V and both Q.
    target: slow copies of both Q; they get no gradient.
    sequences: `[B, P]` prompts and `[B, R]` responses.
  """
  hidden = response_states(config, params, sequences)
  tokens, mask = sequences.response, sequences.response_mask
  values = _head(heads['v'], hidden)[..., 0]
  after = jnp.concatenate([mask[:, 1:], jnp.zeros_like(mask[:, :1])], axis=1)
  shifted = jnp.concatenate([values[:, 1:], jnp.zeros_like(values[:, :1])], axis=1)
  tables = [_q_table(config, heads[name], hidden) for name in ('q1', 'q2')]
  slow = [_q_table(config, target[name], jax.lax.stop_gradient(hidden)) for name in ('q1', 'q2')]

  def taken(table: Array) -> Array:
    return jnp.take_along_axis(table, tokens[..., None], axis=-1)[..., 0]

  return QOutput(
    logprobs=token_logprobs(decoder.logits(config, params, hidden), tokens),
    values=values,
    next_values=jnp.where(after, shifted, 0.0),
    q=jnp.stack([taken(table) for table in tables]),
    target_q=jax.lax.stop_gradient(jnp.minimum(taken(slow[0]), taken(slow[1]))),
    q_nll=jnp.stack([-token_logprobs(table, tokens) for table in tables]),
  )


def tilted_logits(
  config: ModelConfig, params: Params, heads: Params, target: Params, beta: float, hidden: Array
) -> Array:
  """log pi + beta (min target Q - V), `[..., width] -> [..., V]` (Snell et al. 2023, eq. 5)."""
  logprobs = jax.nn.log_softmax(decoder.logits(config, params, hidden), axis=-1)
  q = jnp.minimum(*(_q_table(config, target[name], hidden) for name in ('q1', 'q2')))
  return logprobs + beta * (q - _head(heads['v'], hidden))


def _q_table(config: ModelConfig, params: Params, hidden: Array) -> Array:
  """Q of every token, without the rows that round the vocabulary up."""
  return _head(params, hidden)[..., : config.vocab_size]
