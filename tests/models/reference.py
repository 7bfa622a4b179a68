"""The decoder again, in float64 NumPy, a token, a head and a key at a time; without padding.

It shares nothing with the library but the names of the parameters.
"""

import math
from typing import Any

import numpy as np

from rlhf_jax.models.config import ModelConfig

Array = np.ndarray


def logits(config: ModelConfig, params: Any, tokens: Array) -> Array:
  """`[T]` token ids -> `[T, V]`."""
  x = hidden_states(config, params, tokens)
  table = params['embedding'].T if config.tied_embeddings else params['unembedding']
  scores = x @ table[:, : config.vocab_size]
  if config.logit_softcap is not None:
    scores = config.logit_softcap * np.tanh(scores / config.logit_softcap)
  return scores


def hidden_states(config: ModelConfig, params: Any, tokens: Array) -> Array:
  """`[T]` token ids -> `[T, D]`, after the final norm."""
  x = params['embedding'][tokens] * config.embedding_scale
  if config.positions == 'learned':
    x = x + params['positions'][: len(tokens)]
  for number in range(config.layers):
    x = layer(config, take(params['layers'], number), number, x)
  if config.norm_placement != 'post':
    x = norm(config, config.norm, params['final_norm'], x)
  return x


def take(tree: Any, number: int) -> Any:
  """The parameters of one layer out of the stack."""
  if isinstance(tree, dict):
    return {name: take(part, number) for name, part in tree.items()}
  return tree[number]


def layer(config: ModelConfig, p: Any, number: int, x: Array) -> Array:
  """`[T, D]` -> `[T, D]`."""
  if config.norm_placement == 'post':
    x = norm(config, config.norm, p['attention_post_norm'], x + attend(config, p, number, x))
    return norm(config, config.norm, p['mlp_post_norm'], x + mlp(config, p['mlp'], x))
  a = attend(config, p, number, norm(config, config.norm, p['attention_norm'], x))
  if config.norm_placement == 'sandwich':
    a = norm(config, config.norm, p['attention_post_norm'], a)
  source = x if config.parallel_residual else x + a
  m = mlp(config, p['mlp'], norm(config, config.norm, p['mlp_norm'], source))
  if config.norm_placement == 'sandwich':
    m = norm(config, config.norm, p['mlp_post_norm'], m)
  return x + a + m


def norm(config: ModelConfig, kind: str, p: Any, x: Array) -> Array:
  """RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba et al. 2016) of the last axis."""
  weight = 1 + p['scale'] if config.norm_offset else p['scale']
  if kind == 'rmsnorm':
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.norm_epsilon) * weight
  mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  return (x - mean) / np.sqrt(variance + config.norm_epsilon) * weight + p['bias']


def attend(config: ModelConfig, p: Any, number: int, x: Array) -> Array:
  """Causal attention with everything that may happen to queries, keys and scores."""
  local = False
  if config.window is not None:
    local = config.window_pattern[number % len(config.window_pattern)] == 'L'
  q, k, v = (np.einsum('td,dhk->thk', x, p[name]['kernel']) for name in ('query', 'key', 'value'))
  if config.qkv_bias:
    q, k, v = q + p['query']['bias'], k + p['key']['bias'], v + p['value']['bias']
  if config.qk_norm:
    q = norm(config, 'rmsnorm', p['query_norm'], q)
    k = norm(config, 'rmsnorm', p['key_norm'], k)
  if config.positions == 'rotary':
    q, k = rotate(config, q, local), rotate(config, k, local)
  size = q.shape[-1]
  scale = 1 / math.sqrt(size) if config.query_scale is None else config.query_scale
  group = q.shape[1] // k.shape[1]
  mixed = np.zeros(q.shape)
  for t, h in np.ndindex(q.shape[:2]):
    first = max(0, t - config.window + 1) if local and config.window is not None else 0
    scores = np.array([scale * q[t, h] @ k[s, h // group] for s in range(first, t + 1)])
    if config.attention_softcap is not None:
      scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
    weights = np.exp(scores - scores.max())
    mixed[t, h] = (weights / weights.sum()) @ v[first : t + 1, h // group]
  out = np.einsum('thk,hkd->td', mixed, p['out']['kernel'])
  return out + p['out']['bias'] if config.out_bias else out


def rotate(config: ModelConfig, x: Array, local: bool) -> Array:
  """Turns entry pairs (i, i + n/2) of the first n of each head by position * frequency, as complex
  numbers."""
  size = int(x.shape[-1] * config.rotary_fraction)
  out = x.copy()
  for i in range(size // 2):
    frequency = wave(config, i, size, local)
    for t in range(len(x)):
      turned = (x[t, :, i] + 1j * x[t, :, i + size // 2]) * np.exp(1j * t * frequency)
      out[t, :, i], out[t, :, i + size // 2] = turned.real, turned.imag
  return out


def wave(config: ModelConfig, i: int, size: int, local: bool) -> float:
  """The frequency of pair i, with Llama 3.1's stretching written as in its release."""
  theta = config.rotary_theta
  if local and config.rotary_local_theta is not None:
    return 1 / config.rotary_local_theta ** (2 * i / size)
  frequency = 1 / theta ** (2 * i / size)
  factor = config.rotary_scaling_factor
  if config.rotary_scaling == 'linear':
    return frequency / factor
  if config.rotary_scaling == 'llama3':
    low_wavelength = config.rotary_original_length / config.rotary_low_factor
    high_wavelength = config.rotary_original_length / config.rotary_high_factor
    wavelength = 2 * math.pi / frequency
    if wavelength < high_wavelength:
      return frequency
    if wavelength > low_wavelength:
      return frequency / factor
    smooth = (config.rotary_original_length / wavelength - config.rotary_low_factor) / (
      config.rotary_high_factor - config.rotary_low_factor
    )
    return (1 - smooth) * frequency / factor + smooth * frequency
  return frequency


def mlp(config: ModelConfig, p: Any, x: Array) -> Array:
  """The MLP, with or without a gate."""

  def project(name: str, x: Array) -> Array:
    y = x @ p[name]['kernel']
    return y + p[name]['bias'] if config.mlp_bias else y

  first = activate(config.activation, project('gate' if config.gated_mlp else 'up', x))
  return project('down', first * project('up', x) if config.gated_mlp else first)


def activate(name: str, x: Array) -> Array:
  """SiLU, GELU, and GELU's tanh approximation (Hendrycks and Gimpel 2016)."""
  if name == 'silu':
    return x / (1 + np.exp(-x))
  if name == 'gelu':
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
