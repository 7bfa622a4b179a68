"""Heads for offline Q-learning over tokens: V of a state, and Q of every next token."""

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.common.types import QOutput, Sequences
from rlhf_jax.models import decoder
from rlhf_jax.models.chunked_readout import Readout, TokenScores, token_scores
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.readout import decoder_scores, scores_of_logits
from rlhf_jax.models.roles import response_states

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


def _units(params: Params, hidden: Array) -> Array:
  hidden = hidden.astype(jnp.float32)
  return jax.nn.relu(hidden @ params['hidden']['kernel'] + params['hidden']['bias'])


def _head(params: Params, hidden: Array) -> Array:
  return _units(params, hidden) @ params['out']['kernel'] + params['out']['bias']


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
  q, slow = (
    [_q_scores(config, tree[name], states, tokens) for name in ('q1', 'q2')]
    for tree, states in ((heads, hidden), (target, jax.lax.stop_gradient(hidden)))
  )
  return QOutput(
    logprobs=decoder_scores(config, params, hidden, tokens).logprobs,
    values=values,
    next_values=jnp.where(after, shifted, 0.0),
    q=jnp.stack([scores.chosen for scores in q]),
    target_q=jax.lax.stop_gradient(jnp.minimum(slow[0].chosen, slow[1].chosen)),
    q_nll=jnp.stack([-scores.logprobs for scores in q]),
  )


def tilt(logprobs: Array, q: Array, v: Array, beta: float) -> Array:
  """log pi + beta (Q - V), logits of the policy that ILQL decodes from (Snell et al. 2023, eq. 5).

  Args:
    logprobs: `[..., V]` float32, of every next token.
    q: `[..., V]` float32, the lesser of both target Q.
    v: `[...]` float32, of the state.
    beta: strength of the tilt; 0 is the policy itself.
  """
  return logprobs + beta * (q - v[..., None])


def tilted_logits(
  config: ModelConfig, params: Params, heads: Params, target: Params, beta: float, hidden: Array
) -> Array:
  """`tilt` of the policy by its heads: `[..., width]` hidden states to `[..., V]` logits."""
  logprobs = jax.nn.log_softmax(decoder.logits(config, params, hidden), axis=-1)
  q = jnp.minimum(*(_q_table(config, target[name], hidden) for name in ('q1', 'q2')))
  return tilt(logprobs, q, _head(heads['v'], hidden)[..., 0], beta)


def _q_scores(config: ModelConfig, params: Params, hidden: Array, tokens: Array) -> TokenScores:
  """Q of given tokens, and the normalizer over all."""
  if config.ids_at_once is None:
    return scores_of_logits(_q_table(config, params, hidden), tokens)
  how = Readout(config.vocab_size, config.ids_at_once, vocab_axis=1)
  out = params['out']
  return token_scores(how, _units(params, hidden), out['kernel'], out['bias'], tokens)


def _q_table(config: ModelConfig, params: Params, hidden: Array) -> Array:
  """Q of every token, without the rows that round the vocabulary up."""
  return _head(params, hidden)[..., : config.vocab_size]
