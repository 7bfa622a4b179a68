"""Batches in parts: to bound the memory of what need not see all rows at once."""

from collections.abc import Callable
from typing import Any

import jax


def split_rows(batch: Any, parts: int) -> Any:
  """`[B, ...]` -> `[parts, B / parts, ...]`, row b to part b mod parts.

  The stride keeps every part spread over all devices of a batch sharded by blocks of rows.
  """

  def split(x: Any) -> Any:
    return x.reshape((x.shape[0] // parts, parts) + x.shape[1:]).swapaxes(0, 1)

  return jax.tree.map(split, batch)


def join_rows(batch: Any) -> Any:
  """The inverse of `split_rows`: `[parts, B / parts, ...]` -> `[B, ...]`."""
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape((-1,) + x.shape[2:]), batch)


def map_rows(function: Callable[[Any], Any], batch: Any, parts: int) -> Any:
  """`function(batch)`, computed one part after the other; it must treat every row by itself."""
  if parts == 1:
    return function(batch)
  return join_rows(jax.lax.map(function, split_rows(batch, parts)))
