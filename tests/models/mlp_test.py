"""Perceptrons against explicit matrix products in float64."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.mlp import (
  init_mlp,
  init_twin_q,
  init_values,
  mlp,
  replicated_axes,
  twin_q,
  values,
)
from tests import numerical, quick

RNG = np.random.default_rng(0)
X: Any = RNG.normal(size=(4, 3, 5))
SLOW: dict[str, Callable[[np.ndarray], np.ndarray]] = {
  'relu': lambda x: np.maximum(x, 0),
  'tanh': np.tanh,
}


def randomised(params: Any) -> Any:
  """The same tree with random numbers, biases too."""
  return jax.tree.map(lambda x: jnp.asarray(RNG.normal(size=x.shape), jnp.float32), params)


def slow_mlp(params: Any, x: np.ndarray, activation: str) -> np.ndarray:
  """Layer by layer."""
  for i in range(len(params)):
    layer = {name: np.asarray(part, np.float64) for name, part in params[f'layer_{i}'].items()}
    x = SLOW[activation](x) if i else x
    x = np.einsum('...i,io->...o', x, layer['kernel']) + layer.get('bias', 0)
  return x


@pytest.mark.parametrize('activation', ['relu', 'tanh'])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('hidden', [(), (7,), (7, 6)])
def test_layers_are_applied_in_order(hidden: tuple[int, ...], bias: bool, activation: str) -> None:
  """Any depth, with and without biases; nothing is done to the output of the last layer."""
  params = randomised(init_mlp(jax.random.key(0), (5, *hidden, 2), bias=bias))
  out = quick.jit(mlp, static_argnums=2)(params, X, activation)
  assert out.shape == (4, 3, 2) and out.dtype == jnp.float32
  np.testing.assert_allclose(out, slow_mlp(params, X, activation), rtol=1e-4, atol=1e-4)


def test_kernels_start_orthogonal_and_biases_at_zero() -> None:
  """Whichever side of a kernel is the shorter has orthonormal vectors; layers are different."""
  init = quick.jit(lambda key: init_mlp(key, (5, 8, 8, 2)))
  params = init(jax.random.key(0))
  for layer in params.values():
    kernel = layer['kernel']
    gram = kernel @ kernel.T if kernel.shape[0] < kernel.shape[1] else kernel.T @ kernel
    np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-5)
    assert not np.any(layer['bias'])
  again = init(jax.random.key(1))
  assert not np.allclose(params['layer_1']['kernel'], again['layer_1']['kernel'])


def test_gradients_equal_central_differences() -> None:
  """By the kernel of the first layer, through a hidden one."""
  params = randomised(init_mlp(jax.random.key(0), (5, 4, 1)))

  def slow(kernel: np.ndarray) -> float:
    first = params['layer_0'] | {'kernel': kernel}
    return slow_mlp(params | {'layer_0': first}, X, 'tanh').sum()

  slopes = quick.jit(jax.grad(lambda p: mlp(p, X, 'tanh').sum()))(params)
  expected = numerical.gradient(slow, params['layer_0']['kernel'])
  np.testing.assert_allclose(slopes['layer_0']['kernel'], expected, rtol=1e-3, atol=1e-4)


def test_values_and_action_values_have_one_number_each() -> None:
  """Leading axes are kept; the two Q functions are the two halves of the stacked parameters."""
  states, actions = X, RNG.normal(size=(4, 3, 2))
  v = quick.jit(lambda key: values(init_values(key, 5, (6,)), states))(jax.random.key(0))
  assert v.shape == (4, 3) and v.dtype == jnp.float32
  params = quick.jit(lambda key: init_twin_q(key, 5, 2, (6, 6)))(jax.random.key(0))
  q = quick.jit(twin_q)(params, states, actions)
  assert q.shape == (2, 4, 3) and q.dtype == jnp.float32
  together = np.concatenate([states, actions], -1)
  for i in range(2):
    one = jax.tree.map(lambda x, i=i: x[i], params)
    np.testing.assert_allclose(q[i], slow_mlp(one, together, 'relu')[..., 0], rtol=1e-4, atol=1e-5)
  assert not np.allclose(q[0], q[1])


def test_no_axis_has_a_name() -> None:
  """A None for each axis of each parameter."""
  params = jax.eval_shape(lambda: init_twin_q(jax.random.key(0), 5, 2, (6,)))
  assert replicated_axes(params)['layer_0'] == {
    'kernel': (None, None, None),
    'bias': (None, None),
  }
