"""Tiny decoders of every kind that tests go through."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import decoder
from rlhf_jax.models.config import ModelConfig

VOCAB = 19
# One shape for most tests, so that most share their compiled programs.
ROWS, COLUMNS = 2, 13

# Named after the family whose switches they turn on.
ARCHITECTURES: dict[str, dict[str, Any]] = {
  'default': {},
  'gpt2': dict(
    norm='layernorm',
    norm_epsilon=1e-5,
    positions='learned',
    max_length=24,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    gated_mlp=False,
    activation='gelu_tanh',
    tied_embeddings=True,
    init_std=0.3,
  ),
  'neox': dict(
    norm='layernorm',
    rotary_fraction=0.5,
    parallel_residual=True,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    gated_mlp=False,
    activation='gelu',
  ),
  'llama3': dict(
    kv_heads=2,
    head_dim=8,
    rotary_theta=500.0,
    rotary_scaling='llama3',
    rotary_scaling_factor=8.0,
    rotary_original_length=64,
    vocab_multiple=8,
  ),
  'mistral': dict(kv_heads=1, window=3),
  'qwen2': dict(kv_heads=2, qkv_bias=True, rotary_theta=1e6),
  'qwen3': dict(kv_heads=2, qk_norm=True, head_dim=8),
  'gemma2': dict(
    kv_heads=2,
    head_dim=6,
    norm_placement='sandwich',
    norm_offset=True,
    activation='gelu_tanh',
    tied_embeddings=True,
    embedding_scale=4.0,
    query_scale=0.3,
    window=4,
    window_pattern='LG',
    attention_softcap=2.0,
    logit_softcap=1.5,
  ),
  'gemma3': dict(
    layers=3,
    norm_placement='sandwich',
    norm_offset=True,
    qk_norm=True,
    rotary_theta=1e4,
    rotary_local_theta=50.0,
    rotary_scaling='linear',
    rotary_scaling_factor=8.0,
    window=3,
    window_pattern='LLG',
  ),
  'post': dict(norm_placement='post', norm='layernorm', activation='gelu'),
  'parallel_sandwich': dict(norm_placement='sandwich', parallel_residual=True),
}


def make_config(name: str = 'default', **changes: Any) -> ModelConfig:
  """A decoder 2 layers deep and 16 wide of the given kind, with changes."""
  fields = dict(vocab_size=VOCAB, width=16, layers=2, heads=4, mlp_width=24)
  config = ModelConfig(**(fields | ARCHITECTURES[name] | changes))
  config.validate('model')
  return config


def make_params(config: ModelConfig, seed: int = 0) -> Any:
  """Parameters in which nothing is at its initial 0 or 1, so that every one of them shows.

  They are drawn by NumPy: compiling the initialisation of every architecture takes a minute.
  """
  shapes = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
  rng = np.random.default_rng(seed)

  def draw(path: Any, leaf: Any) -> jax.Array:
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    mean = 1.0 if name.endswith('scale') and not config.norm_offset else 0.0
    return jnp.asarray(rng.normal(mean, 0.25, leaf.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def make_tokens(rows: int = ROWS, length: int = COLUMNS, seed: int = 2) -> jax.Array:
  """Random token ids `[rows, length]`."""
  return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (rows, length)), jnp.int32)


def run(config: ModelConfig, params: Any, tokens: Any, mask: Any) -> jax.Array:
  """Logits `[B, T, V]`; each config is compiled once for all tests."""
  return _compiled(dataclasses.astuple(config))(params, tokens, mask)


@functools.cache
def _compiled(fields: tuple[Any, ...]) -> Callable[..., jax.Array]:
  names = [field.name for field in dataclasses.fields(ModelConfig)]
  config = ModelConfig(**dict(zip(names, fields, strict=True)))

  def apply(params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    hidden, _ = decoder.hidden_states(config, params, tokens, mask)
    return decoder.logits(config, params, hidden)

  return jax.jit(apply)
