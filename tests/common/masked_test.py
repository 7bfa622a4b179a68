"""Masked statistics against NumPy over the unmasked entries, and against garbage under the mask."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.masked import last_true, masked_mean, masked_sum, masked_variance, whiten

RNG = np.random.default_rng(0)
VALUES: Any = RNG.normal(3.0, 2.0, (8, 6)).astype(np.float32)
MASK: Any = RNG.random((8, 6)) < 0.6
BAD = [np.nan, np.inf, -np.inf, 1e30]


def test_statistics_are_those_of_the_unmasked_entries() -> None:
  """Sum, mean and biased variance equal NumPy's over the selected entries, in float64."""
  kept = VALUES[MASK].astype(np.float64)
  np.testing.assert_allclose(masked_sum(VALUES, MASK), kept.sum(), rtol=1e-6)
  np.testing.assert_allclose(masked_mean(VALUES, MASK), kept.mean(), rtol=1e-6)
  np.testing.assert_allclose(masked_variance(VALUES, MASK), kept.var(ddof=0), rtol=1e-5)


def test_statistics_along_an_axis() -> None:
  """Row by row; a row without any entry has sum and mean 0."""
  mask: Any = MASK.copy()
  mask[2] = False
  sums = [row[keep].sum(dtype=np.float64) for row, keep in zip(VALUES, mask, strict=True)]
  means = [total / max(keep.sum(), 1) for total, keep in zip(sums, mask, strict=True)]
  np.testing.assert_allclose(masked_sum(VALUES, mask, axis=-1), sums, rtol=1e-5)
  np.testing.assert_allclose(masked_mean(VALUES, mask, axis=-1), means, rtol=1e-5)
  assert means[2] == 0.0


def test_sums_are_in_float32() -> None:
  """Integers are not truncated and bfloat16 terms are not lost."""
  mask = jnp.ones(1000, bool)
  assert masked_sum(jnp.ones(1000, jnp.bfloat16), mask) == 1000.0
  assert masked_mean(jnp.array([1, 2]), jnp.array([True, True])) == 1.5


@pytest.mark.parametrize('bad', BAD)
def test_masked_garbage_reaches_neither_value_nor_gradient(bad: float) -> None:
  """Statistics and their gradients are those with zeros under the mask; masked gradients are 0."""
  clean: Any = np.where(MASK, VALUES, 0.0)
  dirty: Any = np.where(MASK, VALUES, np.float32(bad))

  def statistics(values: jax.Array) -> jax.Array:
    return (
      masked_sum(values, MASK) + masked_mean(values, MASK) + masked_mean(values, MASK, -1).sum()
    )

  evaluate = jax.jit(jax.value_and_grad(statistics))
  value, slopes = evaluate(dirty)
  expected, expected_slopes = evaluate(clean)
  assert value == expected
  np.testing.assert_array_equal(slopes, expected_slopes)
  np.testing.assert_array_equal(slopes[~MASK], 0.0)
  np.testing.assert_array_equal(
    whiten(dirty, MASK, keep_mean=True), whiten(clean, MASK, keep_mean=True)
  )


@pytest.mark.parametrize('keep_mean', [True, False])
def test_whitening_scales_to_unit_variance(keep_mean: bool) -> None:
  """`(x - mean) / sqrt(var + 1e-8)` with the biased variance; the mean stays or becomes 0."""
  kept = VALUES[MASK].astype(np.float64)
  expected = (kept - kept.mean()) / np.sqrt(kept.var() + 1e-8) + keep_mean * kept.mean()
  whitened = np.asarray(whiten(VALUES, MASK, keep_mean=keep_mean))
  np.testing.assert_allclose(whitened[MASK], expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(whitened[~MASK], 0.0)
  np.testing.assert_allclose(whitened[MASK].var(ddof=0), 1.0, rtol=1e-5)
  np.testing.assert_allclose(whitened[MASK].mean(), keep_mean * kept.mean(), rtol=1e-5, atol=1e-6)


def test_whitening_divides_by_the_count_not_one_less() -> None:
  """Of {0, 2} the biased variance is 1, so whitened they are -1 and 1 (with n - 1: 0.71)."""
  whitened = whiten(jnp.array([0.0, 2.0]), jnp.array([True, True]), keep_mean=False)
  np.testing.assert_allclose(whitened, [-1.0, 1.0], rtol=1e-6)


def test_whitening_a_constant_is_finite() -> None:
  """Equal rewards become zeros (or stay), not nan."""
  constant, mask = jnp.full((2, 3), 4.0), jnp.ones((2, 3), bool)
  np.testing.assert_array_equal(whiten(constant, mask, keep_mean=False), 0.0)
  np.testing.assert_array_equal(whiten(constant, mask, keep_mean=True), 4.0)


def test_whitening_is_global_over_devices() -> None:
  """Rows sharded over eight devices are whitened with the statistics of all rows, not a shard's."""
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  whitened = jax.jit(lambda v, m: whiten(v, m, keep_mean=False))
  sharded = whitened(jax.device_put(VALUES, rows), jax.device_put(MASK, rows))
  np.testing.assert_allclose(sharded, whitened(VALUES, MASK), rtol=1e-5, atol=1e-6)


def test_last_true() -> None:
  """The position of the last True, 0 where there is none, over any leading axes."""
  mask = jnp.array([[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 0, 0]]], bool)
  positions = last_true(mask)
  np.testing.assert_array_equal(positions, [[1, 2], [0, 0]])
  assert positions.dtype == jnp.int32
