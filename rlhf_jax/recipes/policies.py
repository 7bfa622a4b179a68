"""The policy as it samples: its logits, its samples, and its divergence from the reference.

Parameters are by role: `{'policy': decoder}`, and with Q heads beside it a policy that is tilted by
them (ILQL).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from rlhf_jax.common.masked import masked_sum
from rlhf_jax.common.rows import map_rows
from rlhf_jax.common.types import Prompts, Sequences
from rlhf_jax.generation.sample import generate
from rlhf_jax.generation.samples import Samples, repeat_prompts, samples_to_sequences
from rlhf_jax.models import decoder, q_heads, roles
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.objectives import demands_of
from rlhf_jax.ops.kl import exact_kl
from rlhf_jax.recipes.parts import Parts
from rlhf_jax.sharding.mesh import constrain_batch, row_devices

Array = jax.Array
Roles = Mapping[str, Any]
Sampler = Callable[[Roles, Prompts, Array], tuple[Sequences, Samples]]


def temperature_of(parts: Parts) -> float:
  """The temperature every logits tensor is divided by; greedy sampling measures at 1."""
  temperature = parts.config.generation.temperature
  return temperature if temperature > 0 else 1.0


def stops_of(parts: Parts) -> tuple[int, ...]:
  """The tokens that end a response."""
  generation, tokenizer = parts.config.generation, parts.tokenizer
  own = (tokenizer.eos_id, *tokenizer.stops) if generation.stop_at_eos else ()
  return tuple(dict.fromkeys((*own, *generation.stop_tokens)))


def readout(parts: Parts, model: ModelConfig, params: Roles) -> Callable[[Array], Array]:
  """From hidden states `[..., width]` to the logits `[..., V]` that tokens are drawn from."""
  if 'q_heads' not in params:
    return functools.partial(decoder.logits, model, params['policy'])
  q = demands_of(parts.config.objective).q
  assert q is not None
  return functools.partial(
    q_heads.tilted_logits,
    model,
    params['policy'],
    params['q_heads'],
    params['q_target'],
    q.decode_beta,
  )


def make_sampler(parts: Parts, copies: int = 1) -> Sampler:
  """`(params by role, prompts, key) -> responses` at the generation settings; to be jitted.

  So many `copies` of a prompt are answered, in adjacent rows.
  """
  config = parts.config
  generation = dataclasses.replace(config.generation, stop_tokens=stops_of(parts))
  model = generation.sampling(parts.model)

  def sample(params: Roles, prompts: Prompts, key: Array) -> tuple[Sequences, Samples]:
    samples = generate(
      model,
      params['policy'],
      prompts,
      key,
      config=generation,
      max_new_tokens=config.data.response_length,
      eos_id=-1,
      pad_id=parts.tokenizer.pad_id,
      samples=copies,
      readout=readout(parts, model, params),
    )
    sequences = samples_to_sequences(repeat_prompts(prompts, copies), samples)
    return jax.tree.map(constrain_batch, (sequences, samples))

  return sample


def make_kl(parts: Parts) -> Callable[[Roles, Roles, Sequences], Array]:
  """Jitted `(params, reference params, sequences) -> [B]` exact KL summed along each response."""
  temperature = temperature_of(parts)

  @jax.jit
  def kl(params: Roles, reference: Roles, sequences: Sequences) -> Array:
    if 'q_heads' not in params:
      policy, frozen = params['policy'], reference['policy']
      each = roles.response_kl(parts.model, policy, frozen, sequences, temperature)
      return masked_sum(each, sequences.response_mask, axis=-1)
    states = tuple(
      roles.response_states(parts.model, tree['policy'], sequences) for tree in (params, reference)
    )

    def between(states: tuple[Array, Array]) -> Array:
      trees = zip((params, reference), states, strict=True)
      return exact_kl(
        *(readout(parts, parts.model, tree)(hidden) / temperature for tree, hidden in trees)
      )

    # Chunks are of a table alone; a tilt adds up several. Each device then reads row after row.
    rows = len(sequences.response) // row_devices(parts.mesh)
    each = map_rows(between, states, 1 if parts.model.ids_at_once is None else rows)
    return masked_sum(each, sequences.response_mask, axis=-1)

  return kl
