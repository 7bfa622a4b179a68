"""The decoder's block as linen modules; parameters carry the logical names of their axes."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.models import rotary
from rlhf_jax.models.config import ModelConfig

Array = jax.Array
Names = tuple[str | None, ...]
Initializer = Callable[..., Any]
# Queries `[B, H, T, D]`, keys and values `[B, K, S, D]` -> `[B, H, T, D]`.
Attend = Callable[[Array, Array, Array], Array]

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  'silu': jax.nn.silu,
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
}


class Linear(NamedTuple):
  """A linear map of a block.

  Attributes:
    inputs: how many leading axes of its kernel are summed over; the others are its outputs.
    group: the module of the block that it is in, '' for the block itself.
  """

  inputs: int = 1
  group: str = ''


PROJECTIONS = {
  'query': Linear(),
  'key': Linear(),
  'value': Linear(),
  'out': Linear(inputs=2),
  'gate': Linear(group='mlp'),
  'up': Linear(group='mlp'),
  'down': Linear(group='mlp'),
}


def low_rank_shapes(
  config: ModelConfig, name: str, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Shapes of A and B whose product is like the kernel of a projection: inputs, rank, outputs."""
  width, size = config.width, config.size_per_head
  kernel = {
    'query': (width, config.heads, size),
    'key': (width, config.num_kv_heads, size),
    'value': (width, config.num_kv_heads, size),
    'out': (config.heads, size, width),
    'gate': (width, config.mlp_width),
    'up': (width, config.mlp_width),
    'down': (config.mlp_width, width),
  }[name]
  inputs = PROJECTIONS[name].inputs
  return (*kernel[:inputs], rank), (rank, *kernel[inputs:])


def named(init: Initializer, names: Names) -> Initializer:
  """An initializer whose parameter remembers the logical names of its axes."""
  return nn.with_logical_partitioning(init, names)


def weights(config: ModelConfig, fan_in: int, *, ends_branch: bool = False) -> Initializer:
  """Initializer of a matrix that sums over `fan_in` inputs; see `ModelConfig.init_std`."""
  std = fan_in**-0.5 if config.init_std is None else config.init_std
  return nn.initializers.normal(std / math.sqrt(2 * config.layers) if ends_branch else std)


class Norm(nn.Module):
  """RMSNorm or LayerNorm over the last axis, computed in float32."""

  config: ModelConfig
  kind: str
  axis: str | None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    offset = 1.0 if self.config.norm_offset else 0.0
    init = nn.initializers.constant(1.0 - offset)
    scale = self.param('scale', named(init, (self.axis,)), (x.shape[-1],)) + offset
    wide = x.astype(jnp.float32)
    if self.kind == 'layernorm':
      wide = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(wide).mean(-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(variance + self.config.norm_epsilon) * scale
    if self.kind == 'layernorm':
      normed = normed + self.param('bias', named(nn.initializers.zeros, (self.axis,)), scale.shape)
    return normed.astype(x.dtype)


class Projection(nn.Module):
  """A linear map given as an einsum, its kernel (and bias) used in the type of the input.

  Parameters that hold low-rank matrices too (`models/adapters.py`) add `lora_scale` x A B.

  Attributes:
    equation: einsum of the input with the kernel.
    shape: shape of the kernel.
    names: logical names of the kernel's axes.
    initializer: of the kernel.
    bias_axes: which axes of the kernel the bias has, () for no bias; `bias_shape` is how it
      broadcasts against the output.
  """

  equation: str
  shape: tuple[int, ...]
  names: Names
  initializer: Initializer
  bias_axes: tuple[int, ...] = ()
  bias_shape: tuple[int, ...] = ()

  @nn.compact
  def __call__(self, x: Array) -> Array:
    kernel = self.param('kernel', named(self.initializer, self.names), self.shape)
    y = jnp.einsum(self.equation, x, kernel.astype(x.dtype))
    if self.has_variable('params', 'lora_a'):
      y = y + self._low_rank(x)
    if not self.bias_axes:
      return y
    bias = self.param(
      'bias',
      named(nn.initializers.zeros, tuple(self.names[axis] for axis in self.bias_axes)),
      tuple(self.shape[axis] for axis in self.bias_axes),
    )
    return y + bias.reshape(self.bias_shape).astype(x.dtype)

  def _low_rank(self, x: Array) -> Array:
    def leaf(name: str) -> Array:
      return self.get_variable('params', name)

    if self.has_variable('params', 'lora_dropout'):
      keep = 1 - leaf('lora_rate')
      kept = jax.random.bernoulli(leaf('lora_dropout'), keep, x.shape)
      x = jnp.where(kept, x / keep.astype(x.dtype), 0)
    operand, _, rest = self.equation.partition(',')
    kernel, _, result = rest.partition('->')
    inputs = ''.join(axis for axis in kernel if axis not in result)
    outputs = ''.join(axis for axis in kernel if axis in result)
    low = ''.join(axis for axis in operand if axis not in inputs) + 'r'
    y = jnp.einsum(f'{operand},{inputs}r->{low}', x, leaf('lora_a').astype(x.dtype))
    y = jnp.einsum(f'{low},r{outputs}->{result}', y, leaf('lora_b').astype(x.dtype))
    return y * leaf('lora_scale').astype(x.dtype)


class Mlp(nn.Module):
  """down(act(up(x))), or with a gate down(act(gate(x)) * up(x)) (Shazeer 2020)."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: Array) -> Array:
    config = self.config
    act = _ACTIVATIONS[config.activation]
    bias = (1,) if config.mlp_bias else ()
    shape = (config.width, config.mlp_width)

    def widen(name: str) -> Array:
      init = weights(config, config.width)
      return Projection('btd,dm->btm', shape, ('embed', 'mlp'), init, bias, (-1,), name=name)(x)

    hidden = act(widen('gate')) * widen('up') if config.gated_mlp else act(widen('up'))
    init = weights(config, config.mlp_width, ends_branch=True)
    return Projection('btm,md->btd', shape[::-1], ('mlp', 'embed'), init, bias, (-1,), name='down')(
      hidden
    )


class Block(nn.Module):
  """One layer, in two halves with the key-value cache between them, which is the caller's."""

  config: ModelConfig

  def setup(self) -> None:
    config = self.config
    width, heads, kv_heads = config.width, config.heads, config.num_kv_heads
    size = config.size_per_head
    bias = (1, 2) if config.qkv_bias else ()

    def project(count: int, name: str) -> Projection:
      init, names = weights(config, width), ('embed', name, 'head_dim')
      shape, bias_shape = (width, count, size), (count, 1, size)
      return Projection('btd,dhk->bhtk', shape, names, init, bias, bias_shape)

    self.query = project(heads, 'heads')
    self.key = project(kv_heads, 'kv_heads')
    self.value = project(kv_heads, 'kv_heads')
    self.out = Projection(
      'bhtk,hkd->btd',
      (heads, size, width),
      ('heads', 'head_dim', 'embed'),
      weights(config, heads * size, ends_branch=True),
      (2,) if config.out_bias else (),
      (width,),
    )
    self.mlp = Mlp(config)
    norm = functools.partial(Norm, config, config.norm, 'embed')
    if config.norm_placement != 'post':
      self.attention_norm, self.mlp_norm = norm(), norm()
    if config.norm_placement != 'pre':
      self.attention_post_norm, self.mlp_post_norm = norm(), norm()
    if config.qk_norm:
      self.query_norm = Norm(config, 'rmsnorm', 'head_dim')
      self.key_norm = Norm(config, 'rmsnorm', 'head_dim')

  def project(self, x: Array, by: rotary.Rotation | None) -> tuple[Array, Array, Array]:
    """`[B, T, D]` -> queries `[B, H, T, K]` and new keys and values `[B, KV, T, K]`."""
    normed = x if self.config.norm_placement == 'post' else self.attention_norm(x)
    query, key, value = self.query(normed), self.key(normed), self.value(normed)
    if self.config.qk_norm:
      query, key = self.query_norm(query), self.key_norm(key)
    if by is not None:
      query, key = rotary.rotate(query, by), rotary.rotate(key, by)
    return query, key, value

  def finish(self, x: Array, query: Array, key: Array, value: Array, attend: Attend) -> Array:
    """The rest of the layer: attention over all given keys, output projection, MLP, residuals."""
    config = self.config
    mixed = self.out(attend(query, key, value))
    if config.norm_placement == 'post':
      x = self.attention_post_norm(x + mixed)
      return self.mlp_post_norm(x + self.mlp(x))
    if config.norm_placement == 'sandwich':
      mixed = self.attention_post_norm(mixed)
    attended = x + mixed
    hidden = self.mlp(self.mlp_norm(x if config.parallel_residual else attended))
    if config.norm_placement == 'sandwich':
      hidden = self.mlp_post_norm(hidden)
    return attended + hidden

  def __call__(self, x: Array, by: rotary.Rotation | None, attend: Attend) -> Array:
    return self.finish(x, *self.project(x, by), attend)
