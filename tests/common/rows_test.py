"""Batches in parts are the whole batch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.rows import join_rows, map_rows, split_rows


def make_batch() -> dict[str, Any]:
  rng = np.random.default_rng(0)
  return {'x': rng.normal(size=(12, 3)), 'nested': {'y': np.arange(12)}, 'none': None}


@pytest.mark.parametrize('parts', [1, 2, 3, 12])
def test_joined_parts_are_the_batch(parts: int) -> None:
  """Every row once, in its place; part p has the rows p, p + parts, ..."""
  batch = make_batch()
  split = split_rows(batch, parts)
  assert split['x'].shape == (parts, 12 // parts, 3)
  for part in range(parts):
    np.testing.assert_array_equal(split['nested']['y'][part], np.arange(part, 12, parts))
  jax.tree.map(np.testing.assert_array_equal, join_rows(split), batch)


@pytest.mark.parametrize('parts', [1, 2, 3, 12])
def test_a_function_of_rows_does_not_see_the_parts(parts: int) -> None:
  """The result in parts is that of one piece, in the order of the rows, None leaves too."""

  def function(batch: Any) -> Any:
    return {'sum': batch['x'].sum(-1) + batch['nested']['y'], 'none': None, 'x': 2 * batch['x']}

  batch = jax.tree.map(jnp.asarray, make_batch())
  found = jax.jit(lambda batch: map_rows(function, batch, parts))(batch)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, function(batch))


def test_only_a_part_is_computed_at_once() -> None:
  """The point of it: the function is traced with the rows of one part."""
  seen = []

  def function(x: Any) -> Any:
    seen.append(x.shape)
    return x

  jax.eval_shape(lambda x: map_rows(function, x, 4), jnp.zeros((12, 5)))
  assert set(seen) == {(3, 5)}
