"""Times and their ceiling: medians over repetitions, operations a second of plain products."""

import platform
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Side of the square matrices whose product is the ceiling.
_SIDE = {'cpu': 2048}
_ACCELERATOR_SIDE = 8192


def timed(step: Callable[[], Any], repeats: int) -> list[float]:
  """Seconds of each of so many calls, until their results are there."""
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(step())
    seconds.append(time.perf_counter() - start)
  return seconds


def ceiling(dtype: str, repeats: int = 5) -> float:
  """Operations a second of a product of large square matrices, the best of several."""
  side = _SIDE.get(jax.default_backend(), _ACCELERATOR_SIDE)
  a, b = (
    jax.random.normal(jax.random.key(number), (side, side), dtype=jnp.dtype(dtype))
    for number in range(2)
  )
  product = jax.jit(jnp.matmul)
  jax.block_until_ready(product(a, b))
  return 2 * side**3 / min(timed(lambda: product(a, b), repeats))


def spread(seconds: list[float]) -> dict[str, float]:
  """The median, and the least and the most."""
  return {'median': statistics.median(seconds), 'least': min(seconds), 'most': max(seconds)}


def peak_bytes() -> dict[str, int | None]:
  """The most memory so far: of this process, and of its first device where that tells."""
  of_device = jax.local_devices()[0].memory_stats() or {}
  return {
    'host': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    'device': of_device.get('peak_bytes_in_use'),
  }


def machine() -> dict[str, Any]:
  """What the numbers were measured on."""
  return {
    'device': jax.devices()[0].device_kind,
    'devices': jax.device_count(),
    'processor': platform.machine(),
    'jax': jax.__version__,
    'python': platform.python_version(),
  }
