"""Rotary position embeddings (Su et al. 2021), in the half-split layout of NeoX and Llama."""

import math

import jax
import jax.numpy as jnp

from rlhf_jax.models.config import ModelConfig

Array = jax.Array
# Cosines and sines, `[B, T, rotary_dim / 2]` float32 each.
Rotation = tuple[Array, Array]


def frequencies(config: ModelConfig, *, local: bool) -> Array:
  """Angular frequencies in radians a token, `[rotary_dim / 2]` float32.

  theta ** (-2 i / rotary_dim), then scaled. Windowed layers (`local`) with a base of their own are
  not scaled, as in Gemma 3. 'llama3' is the interpolation of Llama 3.1's released code
  (`models/llama3/reference_impl/model.py::apply_scaling`).
  """
  own_theta = config.rotary_local_theta if local else None
  theta = config.rotary_theta if own_theta is None else own_theta
  dim = config.rotary_dim
  plain = jnp.asarray([theta ** (-2.0 * i / dim) for i in range(dim // 2)], jnp.float32)
  if own_theta is not None or config.rotary_scaling == 'none':
    return plain
  if config.rotary_scaling == 'linear':
    return plain / config.rotary_scaling_factor
  turns = config.rotary_original_length * plain / (2.0 * math.pi)
  low, high = config.rotary_low_factor, config.rotary_high_factor
  kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
  return kept * plain + (1.0 - kept) * plain / config.rotary_scaling_factor


def rotation(config: ModelConfig, positions: Array, *, local: bool) -> Rotation:
  """Cosines and sines of the angles at `positions` `[B, T]`."""
  angles = positions[..., None].astype(jnp.float32) * frequencies(config, local=local)
  return jnp.cos(angles), jnp.sin(angles)


def rotate(heads: Array, by: Rotation) -> Array:
  """Rotates the leading entries of `[B, H, T, D]` heads, entry i together with i + dim / 2."""
  cos, sin = (part[:, None] for part in by)
  half = cos.shape[-1]
  *turning, rest = jnp.split(heads, [half, 2 * half], axis=-1)
  first, second = (part.astype(jnp.float32) for part in turning)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate([part.astype(heads.dtype) for part in turned] + [rest], axis=-1)
