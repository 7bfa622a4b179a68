"""Scalar heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.heads import scalar_head, scalar_head_axes, scalar_head_init


def test_a_zero_head_says_zero_and_still_learns() -> None:
  """A new value function predicts 0 everywhere, but its kernel has a gradient."""
  params = scalar_head_init(jax.random.key(0), 5)
  hidden = jnp.arange(30.0).reshape(2, 3, 5)
  assert not np.any(scalar_head(params, hidden))
  gradient = jax.grad(lambda p: scalar_head(p, hidden).sum())(params)
  np.testing.assert_allclose(gradient['kernel'][:, 0], hidden.sum((0, 1)))
  np.testing.assert_allclose(gradient['bias'], [6.0])


def test_a_normal_head_has_the_stated_spread() -> None:
  """Standard deviation 1 / sqrt(width + 1), bias 0."""
  params = scalar_head_init(jax.random.key(0), 4000, 'normal')
  assert params['kernel'].std() == pytest.approx(4001**-0.5, rel=0.03)
  assert not np.any(params['bias'])


def test_the_output_is_float32_whatever_comes_in() -> None:
  """bfloat16 hidden states are widened before the sum."""
  params = scalar_head_init(jax.random.key(0), 64, 'normal')
  hidden = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64)), jnp.bfloat16)
  out = scalar_head(params, hidden)
  assert out.dtype == jnp.float32 and out.shape == (3,)
  wide = np.asarray(hidden, np.float64) @ np.asarray(params['kernel'], np.float64)
  np.testing.assert_allclose(out, wide[:, 0], rtol=1e-5, atol=1e-6)


def test_axes_match_the_parameters() -> None:
  """A name, or None, for each axis."""
  params = scalar_head_init(jax.random.key(0), 5)
  for name, axes in scalar_head_axes().items():
    assert len(axes) == params[name].ndim


def test_an_unknown_initialisation_is_refused() -> None:
  """Neither 'zero' nor 'normal'."""
  with pytest.raises(ValueError, match="init='ones'"):
    scalar_head_init(jax.random.key(0), 5, 'ones')
