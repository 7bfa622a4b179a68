"""Metrics merge to the same value however the values were split."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common import metrics
from rlhf_jax.common.metrics import First, FirstMax, Max, Mean, Metric, Min, Sum

VALUES = np.array([3.0, -1.0, 0.5, 7.0, -2.0, 4.0, 1.0], np.float32)
WEIGHTS = np.array([1.0, 0.0, 0.5, 2.0, 1.0, 0.25, 3.0], np.float32)


def split(cuts: list[int]) -> list[slice]:
  """Contiguous parts of VALUES between the cuts."""
  edges = [0, *cuts, len(VALUES)]
  return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def make(kind: type, part: slice) -> Metric:
  """A metric of that kind over a part of VALUES."""
  values, mask = jnp.asarray(VALUES[part]), jnp.asarray(WEIGHTS[part])
  if kind is Sum:
    return Sum(values.sum())
  if kind is First:
    return First(values[0])
  return kind.of(values, mask > 0) if kind in (Max, Min) else Mean.of(values, mask)


KEPT = VALUES[WEIGHTS > 0]
EXPECTED = {
  Mean: np.average(VALUES, weights=WEIGHTS),
  Max: KEPT.max(),
  Min: KEPT.min(),
  Sum: VALUES.sum(),
  First: VALUES[0],
}


@pytest.mark.parametrize('cuts', [[1], [3, 5]])
@pytest.mark.parametrize('kind', EXPECTED)
def test_merging_parts_equals_the_whole(kind: type, cuts: list[int]) -> None:
  """Unequal parts merge to the metric of all values, also by stacking and reducing."""
  parts = [make(kind, part) for part in split(cuts)]
  merged = metrics.merge([{'x': part} for part in parts])['x']
  np.testing.assert_allclose(merged.value(), EXPECTED[kind], rtol=1e-6)
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
  reduced = metrics.reduce({'x': stacked})['x']
  np.testing.assert_allclose(reduced.value(), EXPECTED[kind], rtol=1e-6)


def test_a_mean_of_means_is_weighted_by_tokens() -> None:
  """One value of 0 and three of 1 make 3/4, not the 1/2 of averaged averages."""
  merged = Mean.of(jnp.zeros(1)).merge(Mean.of(jnp.ones(3)))
  assert float(merged.value()) == 0.75


def test_an_empty_mean_is_zero_and_adds_nothing() -> None:
  """A part without a single unmasked value changes no mean."""
  empty = Mean.of(jnp.full(3, 5.0), jnp.zeros(3, bool))
  assert float(empty.value()) == 0.0
  assert float(empty.merge(Mean.of(jnp.full(2, 7.0))).value()) == 7.0


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_masked_values_do_not_leak(bad: float) -> None:
  """A nan or inf under mask 0 reaches neither the value nor the gradient."""
  mask = jnp.array([True, False, True])
  values = jnp.array([1.0, bad, 2.0])
  assert float(Mean.of(values, mask).value()) == 1.5
  assert float(Max.of(values, mask).value()) == 2.0
  assert float(Min.of(values, mask).value()) == 1.0
  slopes = jax.grad(lambda v: Mean.of(v, mask).value())(values)
  np.testing.assert_array_equal(slopes, [0.5, 0.0, 0.5])


def test_unmasked_nan_is_seen() -> None:
  """Masking hides padding, not trouble."""
  assert np.isnan(Mean.of(jnp.array([1.0, jnp.nan]), jnp.array([True, True])).value())


def test_integers_and_flags_average_in_float32() -> None:
  """Lengths and flags do not truncate, and a bfloat16 sum does not lose its small terms."""
  assert float(Mean.of(jnp.array([1, 2])).value()) == 1.5
  assert float(Mean.of(jnp.array([True, False, False, False])).value()) == 0.25
  ones = Mean.of(jnp.ones(1000, jnp.bfloat16))
  assert ones.total.dtype == jnp.float32 and float(ones.total) == 1000.0


def test_first_keeps_the_earliest_of_a_scan() -> None:
  """Reducing a scan's stack gives what the first iteration saw."""
  _, stacked = jax.lax.scan(lambda c, x: (c, {'x': First(x)}), 0, jnp.array([4.0, 5.0, 6.0]))
  assert metrics.values(metrics.reduce(stacked)) == {'x': 4.0}


def test_merging_keeps_names_that_only_some_parts_have() -> None:
  """A metric that one part lacks is that of the others."""
  merged = metrics.merge(
    [{'a': Sum(jnp.asarray(1.0))}, {'a': Sum(jnp.asarray(2.0)), 'b': Max(jnp.asarray(9.0))}]
  )
  assert metrics.values(merged) == {'a': 3.0, 'b': 9.0}


def test_first_max_is_over_microbatches_but_not_over_updates() -> None:
  """A maximum over the parts of the first update; what later updates saw is left out."""
  microbatches = {'x': FirstMax(jnp.array([[1.0, 3.0], [8.0, 9.0]]).T)}  # [microbatch, update]
  updates = metrics.reduce(microbatches)
  assert isinstance(updates['x'], FirstMax)
  np.testing.assert_array_equal(updates['x'].extreme, [3.0, 9.0])
  assert metrics.values(metrics.over_updates(updates)) == {'x': 3.0}
  merged = FirstMax(jnp.asarray(3.0)).merge(FirstMax(jnp.asarray(5.0)))
  assert isinstance(merged, FirstMax) and float(merged.value()) == 5.0


def test_other_metrics_merge_over_updates_as_over_microbatches() -> None:
  """Only a `FirstMax` tells the two apart."""
  stacked: dict[str, Any] = {
    'mean': Mean(jnp.array([2.0, 4.0]), jnp.array([1.0, 3.0])),
    'max': Max(jnp.array([1.0, 7.0])),
    'first': First(jnp.array([5.0, 6.0])),
  }
  expected = {'mean': 1.5, 'max': 7.0, 'first': 5.0}
  assert metrics.values(metrics.over_updates(stacked)) == expected
  assert metrics.values(metrics.reduce(stacked)) == expected


def test_metrics_survive_json() -> None:
  """Written as text and read again, they have the same bits and merge to the same values."""
  before: dict[str, Any] = {
    'mean': Mean(jnp.float32(0.1) / 3, jnp.float32(7)),
    'max': Max(jnp.float32(-jnp.inf)),
    'min': Min(jnp.float32(1e-30)),
    'tokens': Sum(jnp.int32(123_456_789)),
    'first': First(jnp.float32(2.5)),
    'first_max': FirstMax(jnp.float32(1.25)),
  }
  after = metrics.from_json(json.loads(json.dumps(metrics.to_json(before))))
  for name, metric in before.items():
    assert type(after[name]) is type(metric)
    for old, new in zip(jax.tree.leaves(metric), jax.tree.leaves(after[name]), strict=True):
      assert old.dtype == new.dtype and np.asarray(old).tobytes() == new.tobytes()
  assert metrics.values(metrics.merge([after, before])) == metrics.values(
    metrics.merge([before, before])
  )


def test_means_merge_over_devices() -> None:
  """Rows spread over eight devices give the mean of all rows, whatever each device's weight."""
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  values = np.linspace(-1, 3, 32, dtype=np.float32).reshape(8, 4)
  mask = np.arange(4) < np.arange(8)[:, None] % 5
  value = jax.jit(lambda v, m: Mean.of(v, m).value())(
    jax.device_put(values, rows), jax.device_put(mask, rows)
  )
  np.testing.assert_allclose(value, values[mask].mean(), rtol=1e-6)
