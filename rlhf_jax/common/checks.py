"""Trace-time shape checks: they cost nothing at run time and name the array that is wrong."""

from typing import Any

import jax
import jax.numpy as jnp


class ShapeError(ValueError):
  """An array does not have the declared shape or kind."""


def check_shapes(spec: str, **arrays: Any) -> dict[str, int]:
  """Checks named arrays against a specification and returns the sizes of its axes.

  `check_shapes('logprobs:BR mask:BR scores:B', logprobs=x, mask=y, scores=z)` demands that equal
  letters mean equal sizes; a digit means that very size. Raises `ShapeError` naming the first
  array that disagrees.
  """
  sizes: dict[str, int] = {}
  for item in spec.split():
    name, axes = item.split(':')
    array = arrays[name]
    if not isinstance(array, jax.Array) and not hasattr(array, 'shape'):
      raise ShapeError(
        f'{name}: expected an array of shape [{", ".join(axes)}], got {type(array)}.'
      )
    if len(array.shape) != len(axes):
      raise ShapeError(
        f'{name}: expected {len(axes)} axes [{", ".join(axes)}], got shape {tuple(array.shape)}.'
      )
    for axis, size in zip(axes, array.shape, strict=True):
      expected = int(axis) if axis.isdigit() else sizes.setdefault(axis, size)
      if size != expected:
        raise ShapeError(
          f'{name}: axis {axis} has size {size}, expected {expected} (shape '
          f'{tuple(array.shape)}, specification {spec!r}).'
        )
  return sizes


def check_float(**arrays: Any) -> None:
  """Demands floating-point arrays: integer rewards or advantages silently truncate."""
  for name, array in arrays.items():
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ShapeError(f'{name}: expected a floating-point array, got {array.dtype}.')
