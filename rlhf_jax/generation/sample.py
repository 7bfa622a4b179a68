"""Sampling of responses: the one function that everything calls which samples."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from rlhf_jax.common.checks import check_shapes
from rlhf_jax.common.types import Prompts
from rlhf_jax.generation import decoding
from rlhf_jax.generation.config import GenerationConfig
from rlhf_jax.generation.samples import Samples
from rlhf_jax.models import decoder
from rlhf_jax.models.config import ModelConfig

Array = jax.Array


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
  samples: int = 1,
  readout: Callable[[Array], Array] | None = None,
) -> Samples:
  """Samples responses to each prompt. Pure; to be jitted by the caller.

  Token t of a row is drawn with a key made of `key`, the row's `prompts.index` and t: rows with
  different numbers draw independently, and a row's sample depends neither on its neighbours nor on
  `config.slots`. A prompt is read once for all its samples, which are numbered by `repeat_prompts`.

  Args:
    model: the policy's architecture.
    params: its decoder parameters.
    prompts: `[B, P]`, left-padded.
    key: PRNG key of this round of sampling.
    config: how tokens are drawn, and what stops a response besides `eos_id`.
    max_new_tokens: R, the longest response.
    eos_id: the id that ends a response; -1: none, only `config.stop_tokens` and the length do.
    pad_id: fills `tokens` after the end.
    samples: responses to each prompt.
    readout: from final hidden states `[S, width]`, in the compute type, to the next token's logits
      `[S, V]` float32; None: the decoder's own. Make it inside the jitted function, from arguments
      of that, which are then no constants of the program.

  Returns:
    the responses, `[B * samples, R]`, those to a prompt adjacent. Their log-probs are those that
    `roles.policy_output` (or the `readout`) gives at `config.temperature`, at 1 where that is 0.

  Raises:
    ValueError: max_new_tokens or samples is below 1.
    ShapeError: the prompts' arrays disagree, or what `readout` gives is not `[S, V]`.
  """
  sizes = check_shapes(
    'tokens:BP mask:BP index:B', tokens=prompts.tokens, mask=prompts.mask, index=prompts.index
  )
  if max_new_tokens < 1:
    raise ValueError(f'max_new_tokens={max_new_tokens}: expected at least 1.')
  params = decoder.decoding_params(model, params, gather=config.weights == 'gathered')
  if readout is None:
    readout = functools.partial(decoder.logits, model, params)
  rows = sizes['B'] * samples
  machine = decoding.Machine(
    model,
    params,
    readout,
    config,
    stops=config.stop_tokens if eos_id < 0 else (eos_id, *config.stop_tokens),
    pad_id=pad_id,
    longest=max_new_tokens,
  )
  return decoding.run(machine, prompts, key, samples, min(config.slots or rows, rows))
