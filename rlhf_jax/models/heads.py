"""Scalar heads: a linear read-out of hidden states, for values and rewards."""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
HEAD_INITS = ('zero', 'normal')


def scalar_head_init(key: Array, width: int, init: str = 'zero') -> dict[str, Array]:
  """Parameters `{'kernel': [width, 1], 'bias': [1]}`, float32.

  'zero' is for value heads, 'normal' with standard deviation 1 / sqrt(width + 1) for reward heads
  (Ziegler et al. 2019, released code; Stiennon et al. 2020). Raises ValueError for another `init`.
  """
  if init not in HEAD_INITS:
    raise ValueError(f'init={init!r}: expected one of {HEAD_INITS}.')
  kernel = jnp.zeros((width, 1))
  if init == 'normal':
    kernel = jax.random.normal(key, (width, 1)) * (width + 1) ** -0.5
  return {'kernel': kernel, 'bias': jnp.zeros(1)}


def scalar_head_axes() -> dict[str, tuple[str | None, ...]]:
  """Logical axis names of a head's parameters."""
  return {'kernel': ('embed', None), 'bias': (None,)}


def scalar_head(params: dict[str, Any], hidden: Array) -> Array:
  """`[..., width]` -> `[...]`, in float32 whatever the type of `hidden`."""
  hidden = hidden.astype(jnp.float32)
  return (hidden @ params['kernel'])[..., 0] + params['bias'][0]
