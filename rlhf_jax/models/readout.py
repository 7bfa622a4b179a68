"""From final hidden states to what is known of given tokens, at once or in vocabulary chunks."""

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models import chunked_readout, decoder
from rlhf_jax.models.chunked_readout import Readout, TokenScores, token_scores
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.ops import kl
from rlhf_jax.ops.logprobs import entropy

Array = jax.Array


def decoder_scores(
  config: ModelConfig,
  params: dict[str, Any],
  hidden: Array,
  tokens: Array,
  temperature: float = 1.0,
) -> TokenScores:
  """Scores of given tokens by a decoder, in chunks where `config.vocab_chunk` says so.

  Args:
    config: the architecture.
    params: the decoder's parameters; those of its layers are not read.
    hidden: `[B, R, width]` final hidden states.
    tokens: `[B, R]` int32.
    temperature: what logits are divided by, in float32.
  """

  def read(params: dict[str, Any], hidden: Array) -> TokenScores:
    return scores_of_logits(decoder.logits(config, params, hidden) / temperature, tokens)

  if config.ids_at_once is not None:
    how, table = _of_decoder(config, params, temperature)
    return token_scores(how, hidden, table, None, tokens)
  if config.remat_policy != 'none':
    # Several [B, R, V] float32 arrays would otherwise wait for the backward pass.
    read = jax.checkpoint(read)
  return read({name: value for name, value in params.items() if name != 'layers'}, hidden)


def decoder_kl(
  config: ModelConfig,
  policy: tuple[dict[str, Any], Array],
  reference: tuple[dict[str, Any], Array],
  temperature: float,
) -> Array:
  """Exact KL(policy || reference) at each position, `[B, R]` float32, both at one temperature.

  Args:
    config: the architecture of both.
    policy: its decoder parameters and final hidden states `[B, R, width]`.
    reference: likewise.
    temperature: what logits are divided by, in float32.
  """
  if config.ids_at_once is None:
    return kl.exact_kl(
      *(decoder.logits(config, *each) / temperature for each in (policy, reference))
    )
  how, table = _of_decoder(config, policy[0], temperature)
  _, reference_table = _of_decoder(config, reference[0], temperature)
  return chunked_readout.exact_kl(how, (policy[1], table), (reference[1], reference_table))


def scores_of_logits(logits: Array, tokens: Array) -> TokenScores:
  """The same of logits `[B, R, V]` that are at hand."""
  logits = logits.astype(jnp.float32)
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return TokenScores(chosen, jax.nn.logsumexp(logits, axis=-1), entropy(logits))


def _of_decoder(
  config: ModelConfig, params: dict[str, Any], temperature: float
) -> tuple[Readout, Array]:
  """How a decoder's final hidden states are read, and the table they are read with."""
  assert config.ids_at_once is not None
  name, axis = ('embedding', 0) if config.tied_embeddings else ('unembedding', 1)
  how = Readout(config.vocab_size, config.ids_at_once, axis, temperature, config.logit_softcap)
  return how, params[name]
