"""Sampled responses, and the prompts that they answer."""

import jax
import numpy as np
from flax import struct

from rlhf_jax.common.types import Prompts, Sequences

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
  if samples == 1:
    return prompts
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
