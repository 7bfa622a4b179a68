"""The likelihood terms that objectives on comparisons have beside their preference loss."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import check_shapes
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.masked import masked_mean, masked_sum
from rlhf_jax.common.types import Pairs, Sequences
from rlhf_jax.objectives.base import Actors, Params, of_preferred

Array = jax.Array

NORMALIZATIONS = ('response', 'token')


def check_normalization(path: str, name: str, value: str) -> None:
  """Raises ConfigError for what no term is divided by."""
  if value not in NORMALIZATIONS:
    raise ConfigError(f'{path}.{name}', value, f'one of {NORMALIZATIONS}')


def preferred(preference: Array) -> Array:
  """`[B, 2]` bool: the response that is more likely better; both of a tie."""
  return jnp.stack([preference >= 0.5, preference <= 0.5], axis=-1)


def with_imitated_tokens(pairs: Pairs, mask: Array) -> Pairs:
  """The whole batch with `imitated_tokens` filled in: `mask` `[B, 2, T]` counts, over the rows.

  It must be called with the batch of a whole optimizer update (in `prepare`): a microbatch counts
  only its part, and its mean would weigh its tokens by how many its neighbours have.
  """
  count = mask.sum(dtype=jnp.float32)
  rows = pairs.preference.shape
  return dataclasses.replace(pairs, imitated_tokens=jnp.full(rows, count / rows[0]))


def count_preferred(
  config: Any, actors: Actors, params: Params, reference: Params | None, batch: Pairs
) -> Pairs:
  """`prepare` of objectives that imitate the preferred responses: counts their tokens."""
  del config, actors, params, reference
  chosen = preferred(batch.preference)[..., None]
  return with_imitated_tokens(batch, chosen & batch.sequences.response_mask)


def as_responses(sequences: Sequences) -> tuple[Sequences, Array]:
  """Prompts and responses as the responses to the prompts' first tokens, `[..., P + R - 1]`.

  So that what a policy says of given responses is said of prompts too, in one forward pass.

  Returns:
    the texts, right-padded, and which of their tokens are the responses' (bool).
  """
  length = sequences.prompt.shape[-1]
  # What is said of a prompt's tokens is said of the prompt of each response.
  shape = (*sequences.response.shape[:-1], length)
  prompt, prompt_mask = (
    jnp.broadcast_to(x, shape) for x in (sequences.prompt, sequences.prompt_mask)
  )
  tokens = jnp.concatenate([prompt, sequences.response], axis=-1)
  mask = jnp.concatenate([prompt_mask, sequences.response_mask], axis=-1)
  padding = length - prompt_mask.sum(-1, keepdims=True)
  # The padding before the prompt goes behind the response.
  places = (jnp.arange(tokens.shape[-1]) + padding) % tokens.shape[-1]
  tokens, mask = (jnp.take_along_axis(x, places, axis=-1) for x in (tokens, mask))
  texts = Sequences(tokens[..., :1], mask[..., :1], tokens[..., 1:], mask[..., 1:])
  return texts, texts.response_mask & (places[..., 1:] >= length)


def token_nll(logprobs: Array, mask: Array, pairs: Pairs) -> Array:
  """Rows `[B]` float32 whose mean over the whole batch is the negative log-likelihood of a token.

    nll_b = -(B / N) sum_{k, t} mask_bkt logprobs_bkt,   N = sum of the whole batch's mask

  So a sum over rows divided by the number of rows, like that of any loss, is a mean over tokens,
  however the rows are split.

  Args:
    logprobs: `[B, 2, T]` float.
    mask: `[B, 2, T]` bool, the imitated tokens.
    pairs: with N / B of the whole batch in `imitated_tokens`.
  """
  assert pairs.imitated_tokens is not None, 'the recipe prepares whole batches'
  check_shapes(
    'logprobs:B2T mask:B2T tokens:B', logprobs=logprobs, mask=mask, tokens=pairs.imitated_tokens
  )
  return -masked_sum(logprobs, mask, axis=(-2, -1)) / pairs.imitated_tokens


def preferred_nll(normalization: str, logprobs: Array, mask: Array, pairs: Pairs) -> Array:
  """Negative log-likelihood of preferred responses, rows `[B]` float32 of a mean over pairs.

  Args:
    normalization: 'response', the mean over the tokens of each response, of a tie both responses'
      mean; 'token', `token_nll` of all preferred tokens of the batch, those of a tie's both
      responses among them.
    logprobs: `[B, 2, T]` float.
    mask: `[B, 2, T]` bool, the tokens of both responses that count.
    pairs: the labels, and with 'token' the whole batch's count.
  """
  if normalization == 'token':
    return token_nll(logprobs, preferred(pairs.preference)[..., None] & mask, pairs)
  return of_preferred(-masked_mean(logprobs, mask, axis=-1), pairs.preference)
