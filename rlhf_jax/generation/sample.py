"""Sampling of responses: prefill, then a decode loop that ends when every row has."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rlhf_jax.common import prng
from rlhf_jax.common.checks import check_shapes
from rlhf_jax.common.types import Prompts, Sequences
from rlhf_jax.generation.config import GenerationConfig
from rlhf_jax.models import decoder
from rlhf_jax.models.cache import Cache, init_cache
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.ops.logprobs import token_logprobs

Array = jax.Array


@struct.dataclass
class Samples:
  """Sampled responses; `R` is `max_new_tokens`.

  Attributes:
    tokens: `[B, R]` int32, right-padded.
    mask: `[B, R]` bool, True up to and including the first stop token. It comes from when rows
      stopped, so the padding id may be sampled, and may be a stop token.
    logprobs: `[B, R]` float32, of the unfiltered distribution at the sampling temperature; 0 where
      the mask is False.
    finished: `[B]` bool, whether a stop token ended the response.
  """

  tokens: Array
  mask: Array
  logprobs: Array
  finished: Array


@struct.dataclass
class _State:
  """What the decode loop carries: `step` tokens are sampled, `last` `[B]` is not yet read."""

  step: Array
  last: Array
  samples: Samples
  cache: Cache


class _Drawing(NamedTuple):
  """How tokens are drawn, with a key `[B]` for each row, and what ends a row."""

  keys: Array
  config: GenerationConfig
  stops: tuple[int, ...]
  pad_id: int


def generate(
  model: ModelConfig,
  params: Any,
  prompts: Prompts,
  key: Array,
  *,
  config: GenerationConfig,
  max_new_tokens: int,
  eos_id: int,
  pad_id: int,
  readout: Callable[[Array], Array] | None = None,
) -> Samples:
  """Samples a response to each prompt. Pure; to be jitted by the caller.

  Token t of a row is drawn with a key made of `key`, the row's `prompts.index` and t: rows with
  different numbers draw independently, and a row's sample does not depend on its neighbours. For
  several samples of one prompt give each a number of its own (`repeat_prompts`).

  Args:
    model: the policy's architecture.
    params: its decoder parameters.
    prompts: `[B, P]`, left-padded.
    key: PRNG key of this round of sampling.
    config: how tokens are drawn, and what stops a response besides `eos_id`.
    max_new_tokens: R, the longest response.
    eos_id: the id that ends a response; -1: none, only `config.stop_tokens` and the length do.
    pad_id: fills `tokens` after the end.
    readout: from final hidden states `[B, width]`, in the compute type, to the next token's logits
      `[B, V]` float32; None: the decoder's own. Make it inside the jitted function, from parameters
      that are arguments of that: what it closes over is then no constant of the program.

  Returns:
    the responses. Their log-probs are those of `roles.policy_output` (or of the `readout`) at
    `config.temperature`, and at temperature 1 where that is 0.

  Raises:
    ValueError: max_new_tokens is below 1.
    ShapeError: the prompts' arrays disagree, or what `readout` gives is not `[B, V]`.
  """
  sizes = check_shapes(
    'tokens:BP mask:BP index:B', tokens=prompts.tokens, mask=prompts.mask, index=prompts.index
  )
  if max_new_tokens < 1:
    raise ValueError(f'max_new_tokens={max_new_tokens}: expected at least 1.')
  params = decoder.decoding_params(model, params, gather=config.weights == 'gathered')
  if readout is None:
    readout = functools.partial(decoder.logits, model, params)
  stops = config.stop_tokens if eos_id < 0 else (eos_id, *config.stop_tokens)
  drawing = _Drawing(prng.row_keys(key, prompts.index), config, stops, pad_id)

  def unfinished(state: _State) -> Array:
    return (state.step < max_new_tokens) & ~state.samples.finished.all()

  # The last token sampled is never read, so the cache needs no column for it.
  cache = _prefill(model, params, prompts, sizes['P'] + max_new_tokens - 1)
  samples = _no_samples((sizes['B'], max_new_tokens), pad_id)
  state = _State(jnp.zeros((), jnp.int32), prompts.tokens[:, -1], samples, cache)
  extend = functools.partial(_extend, model, params, readout, drawing)
  return jax.lax.while_loop(unfinished, extend, state).samples


def sample_tokens(logits: Array, keys: Array, config: GenerationConfig) -> tuple[Array, Array]:
  """Draws a token a row.

  Args:
    logits: `[B, V]` float32, as the model gives them.
    keys: `[B]` PRNG keys.
    config: temperature and filters; the temperature comes first, then top-k, then top-p.

  Returns:
    `[B]` int32 tokens, and `[B]` float32 their log-probs before filtering, at the temperature (at 1
    where that is 0).
  """
  if config.temperature == 0:
    tokens = jnp.argmax(logits, axis=-1)
  else:
    logits = logits / config.temperature
    tokens = jax.vmap(jax.random.categorical)(keys, filter_logits(logits, config))
  tokens = tokens.astype(jnp.int32)
  return tokens, token_logprobs(logits, tokens)


def filter_logits(logits: Array, config: GenerationConfig) -> Array:
  """Puts -inf where `top_k` and then `top_p` forbid; what ties with the last token kept is kept."""
  if 0 < config.top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, config.top_k)[0][..., -1:]
    logits = jnp.where(logits >= least, logits, -jnp.inf)
  if config.top_p < 1.0:
    descending = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(descending, axis=-1)
    # A token is needed as long as the likelier ones do not hold enough; the first always is.
    needed = jnp.cumsum(probs, axis=-1) - probs < config.top_p
    least = jnp.where(needed, descending, jnp.inf).min(-1, keepdims=True)
    logits = jnp.where(logits >= least, logits, -jnp.inf)
  return logits


def repeat_prompts(prompts: Prompts, samples: int) -> Prompts:
  """Several copies of each prompt, to sample as many responses to it.

  Args:
    prompts: `[B, P]`, on the host or on devices.
    samples: copies of each.

  Returns:
    `[B * samples, P]`; copies are adjacent, and copy k of a prompt is numbered
    `index * samples + k`, so that every row draws by itself.

  Raises:
    ValueError: samples is below 1.
  """
  if samples < 1:
    raise ValueError(f'samples={samples}: expected at least 1.')
  copies = prompts.index[:, None] * samples + np.arange(samples, dtype=np.int32)
  return Prompts(
    tokens=prompts.tokens.repeat(samples, axis=0),
    mask=prompts.mask.repeat(samples, axis=0),
    index=copies.reshape(-1),
  )


def samples_to_sequences(prompts: Prompts, samples: Samples) -> Sequences:
  """Prompts with their sampled responses."""
  return Sequences(
    prompt=prompts.tokens,
    prompt_mask=prompts.mask,
    response=samples.tokens,
    response_mask=samples.mask,
  )


def _prefill(model: ModelConfig, params: Any, prompts: Prompts, columns: int) -> Cache:
  """A cache of that many columns that holds the prompts, their last tokens left out.

  Those are left to the loop, which then has the only copy of a step: half as much to compile.
  """
  rows, length = prompts.tokens.shape
  cache = init_cache(model, rows, columns)
  if length > 1:
    start = (prompts.tokens[:, :-1], prompts.mask[:, :-1])
    _, cache = decoder.hidden_states(model, params, *start, cache=cache)
  return cache


def _no_samples(shape: tuple[int, int], pad_id: int) -> Samples:
  return Samples(
    tokens=jnp.full(shape, pad_id, jnp.int32),
    mask=jnp.zeros(shape, bool),
    logprobs=jnp.zeros(shape, jnp.float32),
    finished=jnp.zeros(shape[0], bool),
  )


def _extend(
  model: ModelConfig,
  params: Any,
  readout: Callable[[Array], Array],
  drawing: _Drawing,
  state: _State,
) -> _State:
  """Reads the last token of each row and samples the next."""
  tokens, mask = state.last[:, None], ~state.samples.finished[:, None]
  hidden, cache = decoder.hidden_states(model, params, tokens, mask, cache=state.cache)
  logits = readout(hidden[:, 0])
  check_shapes('hidden:B1D logits:BV', hidden=hidden, logits=logits)
  keys = jax.vmap(jax.random.fold_in, (0, None))(drawing.keys, state.step)
  drawn, logprobs = sample_tokens(logits, keys, drawing.config)
  samples = _append(state.samples, state.step, drawn, logprobs, drawing)
  return _State(state.step + 1, drawn, samples, cache)


def _append(
  samples: Samples, step: Array, drawn: Array, logprobs: Array, drawing: _Drawing
) -> Samples:
  """Writes column `step` of rows that go on, and marks those that a stop token ends."""
  running = ~samples.finished
  stopped = jnp.zeros_like(running)
  for stop in drawing.stops:
    stopped |= drawn == stop

  def write(column: Array, array: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(array, column[:, None], step, axis=1)

  return Samples(
    tokens=write(jnp.where(running, drawn, drawing.pad_id), samples.tokens),
    mask=write(running, samples.mask),
    logprobs=write(jnp.where(running, logprobs, 0.0), samples.logprobs),
    finished=samples.finished | (running & stopped),
  )
