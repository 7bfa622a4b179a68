"""Multilayer perceptrons as pure functions over plain dicts of float32 parameters."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Params = dict[str, Any]

ACTIVATIONS = {'relu': jax.nn.relu, 'tanh': jnp.tanh}


def init_mlp(key: Array, sizes: Sequence[int], *, bias: bool = True) -> Params:
  """Orthogonal kernels of gain 1 and zero biases (Hejna et al. 2023, released code: `ortho_init`).

  Args:
    key: seeds the kernels.
    sizes: of the input, the hidden layers if any, and the output.
    bias: whether layers have one.

  Returns:
    `{'layer_0': {'kernel': [in, out], 'bias': [out]}, 'layer_1': ...}`.
  """
  shapes = list(zip(sizes[:-1], sizes[1:], strict=True))
  orthogonal = jax.nn.initializers.orthogonal()
  params: Params = {}
  for i, (shape, layer_key) in enumerate(
    zip(shapes, jax.random.split(key, len(shapes)), strict=True)
  ):
    params[f'layer_{i}'] = {'kernel': orthogonal(layer_key, shape, jnp.float32)}
    if bias:
      params[f'layer_{i}']['bias'] = jnp.zeros(shape[1])
  return params


def mlp(params: Params, x: Array, activation: str) -> Array:
  """`[..., in]` -> `[..., out]` float32; the activation stands between layers, not at the end."""
  x = x.astype(jnp.float32)
  for i in range(len(params)):
    layer = params[f'layer_{i}']
    x = x if i == 0 else ACTIVATIONS[activation](x)
    x = x @ layer['kernel'] + layer.get('bias', 0.0)
  return x


def init_values(key: Array, states: int, hidden: Sequence[int]) -> Params:
  """V(s), parameters of `values`."""
  return init_mlp(key, (states, *hidden, 1))


def values(params: Params, states: Array, activation: str = 'relu') -> Array:
  """V(s): `[..., S]` -> `[...]` float32."""
  return mlp(params, states, activation)[..., 0]


def init_twin_q(key: Array, states: int, actions: int, hidden: Sequence[int]) -> Params:
  """Two independent Q(s, a) (Fujimoto et al. 2018), stacked: parameters of `twin_q`."""
  init = functools.partial(init_mlp, sizes=(states + actions, *hidden, 1))
  return jax.vmap(init)(jax.random.split(key, 2))


def twin_q(params: Params, states: Array, actions: Array, activation: str = 'relu') -> Array:
  """Both Q(s, a): `[..., S]`, `[..., A]` -> `[2, ...]` float32."""
  both = jnp.concatenate([states, actions], axis=-1)
  return jax.vmap(lambda p: mlp(p, both, activation)[..., 0])(params)


def replicated_axes(params: Params) -> Params:
  """For parameters of this module (or their shapes): no axis has a name, none is ever split."""
  return jax.tree.map(lambda leaf: (None,) * leaf.ndim, params)
