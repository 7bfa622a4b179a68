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


@pytest.mark.parametrize('queries', [6, 5])
def test_tokamax_of_the_last_columns(queries: int) -> None:
  """As for responses behind a prompt that they share."""
  pytest.importorskip('tokamax', reason="needs the extra 'kernels'")
  kernel, plain = (functools.partial(f, scale=0.3) for f in (attention_kernels.tokamax, attention))
  query, key, value = make_inputs()
  arguments = (query[:, :, T - queries :], key, value, make_mask(None)[:, T - queries :])
  seen = REAL[:, None, T - queries :, None]
  np.testing.assert_allclose(kernel(*arguments) * seen, plain(*arguments) * seen, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize('queries', [6, 5])
def test_cudnn_of_the_last_columns(queries: int) -> None:
  """To the precision of bfloat16, gradients too."""
  query, key, value = make_inputs('bfloat16', 64)
  mask, seen = make_mask(None)[:, T - queries :], REAL[:, None, T - queries :, None]

  def total(kernel: Any, *arrays: Any) -> Any:
    mixed = jnp.where(seen, kernel(*arrays, mask, scale=0.3), 0)
    return jnp.square(mixed.astype(jnp.float32)).sum(), mixed

  def both(kernel: Any) -> Any:
    one = functools.partial(total, kernel)
    return jax.jit(jax.value_and_grad(one, (0, 1, 2), has_aux=True))(
      query[:, :, T - queries :], key, value
    )

  assert_equal(both(attention_kernels.cudnn), both(attention), 0.05)


@pytest.mark.gpu
@pytest.mark.parametrize('window', [None, 3])
def test_cudnn_equals_the_plain_one(window: int | None) -> None:
  """To the precision of bfloat16, with an odd number of columns."""
  options: Any = dict(scale=0.3)
  kernel, plain = (functools.partial(f, **options) for f in (attention_kernels.cudnn, attention))
  arguments = make_inputs('bfloat16', 64), make_mask(window)
  assert_equal(run(kernel, *arguments), run(plain, *arguments), 0.03)


@pytest.mark.parametrize('queries', [T, 6])
def test_columns_added_for_a_kernel_change_nothing(queries: int) -> None:
  """Odd numbers are made even as for cuDNN: the added column is seen by nobody."""
  query, key, value = make_inputs()
  inputs, mask = (query[:, :, T - queries :], key, value), make_mask(None)[:, T - queries :]
  longer, mask_of_longer = attention_kernels._make_even(inputs, mask)
  assert mask_of_longer.shape == (B, queries + queries % 2, T + 1)
  assert not mask_of_longer[..., T].any()
  seen = REAL[:, None, T - queries :, None]
  plain: Any = functools.partial(attention, scale=0.3)
  actual, expected = plain(*longer, mask_of_longer)[:, :, :queries], plain(*inputs, mask)
  np.testing.assert_allclose(actual * seen, expected * seen, rtol=1e-5, atol=1e-6)


def later(kernel: Callable[..., jax.Array], inputs: tuple[jax.Array, ...], seen: Any) -> Any:
  """`run` of the queries of the last 6 columns alone."""

  def of_last(query: Any, key: Any, value: Any, seen: Any) -> jax.Array:
    mixed = kernel(query[:, :, T - 6 :], key, value, seen)
    return jnp.pad(mixed, ((0, 0), (0, 0), (T - 6, 0), (0, 0)))

  return run(of_last, inputs, seen)


@pytest.mark.slow
@pytest.mark.parametrize('window', [None, 3])
def test_splash_attention_of_the_last_columns(window: int | None) -> None:
  """As for responses behind a prompt that they share."""
  options: Any = dict(scale=0.3)
  kernel = functools.partial(attention_kernels.splash, window=window, interpret=True, **options)
  plain = functools.partial(attention, **options)
  expected = later(plain, make_inputs(), make_mask(window)[:, T - 6 :])
  assert_equal(later(kernel, make_inputs(), jnp.asarray(REAL)), expected, 1e-4)


@pytest.mark.slow
def test_splash_attention_of_several_texts_in_a_row() -> None:
  """A token sees its own text alone."""
  texts = np.where(REAL, np.arange(T) // 5 + 1, 0)
  mask = make_mask(3) & jnp.asarray(texts[:, :, None] == texts[:, None])
  kernel = functools.partial(attention_kernels.splash, window=3, interpret=True, scale=0.3)
  expected = run(functools.partial(attention, scale=0.3), make_inputs(), mask)
  assert_equal(run(kernel, make_inputs(), jnp.asarray(texts)), expected, 1e-4)
