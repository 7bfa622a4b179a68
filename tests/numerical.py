"""Derivatives by central differences, for functions written in float64 NumPy."""

from collections.abc import Callable

import numpy as np


def gradient(
  function: Callable[[np.ndarray], float], point: np.ndarray, step: float = 1e-5
) -> np.ndarray:
  """Gradient of a scalar function at `point`; good to about 1e-9 where it is smooth.

  Every entry is moved by `step` both ways, so the point must lie further than that from any kink.
  """
  point = np.asarray(point, np.float64)
  slopes = np.zeros_like(point)
  for index in np.ndindex(point.shape):
    ahead, behind = point.copy(), point.copy()
    ahead[index] += step
    behind[index] -= step
    slopes[index] = (function(ahead) - function(behind)) / (2 * step)
  return slopes


def log_sigmoid(x: np.ndarray) -> np.ndarray:
  """`log(1 / (1 + exp(-x)))`, stable, in float64."""
  return -np.logaddexp(0.0, -np.asarray(x, np.float64))
