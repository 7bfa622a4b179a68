"""Each kernel against the plain attention, in values and gradients, where it can run."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import attention_kernels
from rlhf_jax.ops.attention import attention

B, T, D = 2, 11, 8
# Real tokens of each row: padded on the left, and on both sides.
REAL = np.arange(T) >= np.array([4, 1])[:, None]
REAL[1, 9:] = False


def make_inputs(dtype: str = 'float32', size: int = D) -> tuple[jax.Array, ...]:
  """Queries of 4 heads, keys and values of 2."""
  rng = np.random.default_rng(0)
  shapes = ((B, 4, T, size), (B, 2, T, size), (B, 2, T, size))
  return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def make_mask(window: int | None) -> jax.Array:
  """Real tokens at or before a column, and in its window."""
  distance = np.arange(T)[:, None] - np.arange(T)
  seen = (distance >= 0) & (distance < (T if window is None else window))
  return jnp.asarray(seen & REAL[:, None])


def run(kernel: Callable[..., jax.Array], inputs: tuple[jax.Array, ...], seen: Any) -> Any:
  """What real tokens get, zeros elsewhere, and the gradients of a weighted sum of it."""
  weights = jnp.asarray(np.random.default_rng(1).normal(size=inputs[0].shape), jnp.float32)

  def total(query: Any, key: Any, value: Any) -> Any:
    mixed = jnp.where(REAL[:, None, :, None], kernel(query, key, value, seen), 0)
    return (weights * mixed).sum(), mixed

  (_, mixed), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*inputs)
  return mixed, gradients


def assert_equal(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
  """Leaf by leaf, in the same types."""

  def check(a: jax.Array, b: jax.Array) -> None:
    assert a.dtype == b.dtype
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)

  jax.tree.map(check, actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize(('window', 'softcap'), [(None, None), (3, None), (3, 2.0)])
def test_splash_attention_equals_the_plain_one(window: int | None, softcap: float | None) -> None:
  """Its own text interpreted: padding as a segment, windows by column, soft-caps, shared heads."""
  inputs = make_inputs()
  options: Any = dict(scale=0.3, softcap=softcap)
  kernel = functools.partial(attention_kernels.splash, window=window, interpret=True, **options)
  plain = functools.partial(attention, **options)
  expected = run(plain, inputs, make_mask(window))
  assert_equal(run(kernel, inputs, jnp.asarray(REAL)), expected, 1e-4)


@pytest.mark.parametrize(('window', 'softcap'), [(None, None), (3, 2.0)])
def test_tokamax_equals_the_plain_one(window: int | None, softcap: float | None) -> None:
  """Whichever of its kernels this device gets."""
  pytest.importorskip('tokamax', reason="needs the extra 'kernels'")
  options: Any = dict(scale=0.3, softcap=softcap)
  kernel, plain = (functools.partial(f, **options) for f in (attention_kernels.tokamax, attention))
  arguments = make_inputs(), make_mask(window)
  assert_equal(run(kernel, *arguments), run(plain, *arguments))


@pytest.mark.gpu
@pytest.mark.parametrize('window', [None, 3])
def test_cudnn_equals_the_plain_one(window: int | None) -> None:
  """To the precision of bfloat16, with an odd number of columns."""
  options: Any = dict(scale=0.3)
  kernel, plain = (functools.partial(f, **options) for f in (attention_kernels.cudnn, attention))
  arguments = make_inputs('bfloat16', 64), make_mask(window)
  assert_equal(run(kernel, *arguments), run(plain, *arguments), 0.03)


def test_columns_added_for_a_kernel_change_nothing() -> None:
  """An odd length is made even as for cuDNN: the added column is seen by nobody."""
  inputs, mask = make_inputs(), make_mask(None)
  longer, mask_of_longer = attention_kernels._lengthen(inputs, mask, 1)
  assert mask_of_longer.shape == (B, T + 1, T + 1) and not mask_of_longer[..., T].any()
  seen = REAL[:, None, :, None]
  plain: Any = functools.partial(attention, scale=0.3)
  actual, expected = plain(*longer, mask_of_longer)[:, :, :T], plain(*inputs, mask)
  np.testing.assert_allclose(actual * seen, expected * seen, rtol=1e-5, atol=1e-6)
