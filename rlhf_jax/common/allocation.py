"""How the C library gives memory to programs that compute on the processor."""

import ctypes
import importlib.util
import os
import sys

# glibc's malloc.h: (parameter, value, name in the environment)
# One heap for all threads, which is never cut up into memory maps nor given back: every step asks
# for the same hundreds of megabytes, which the kernel would clear each time.
_SETTINGS = (
  (-8, 1, 'MALLOC_ARENA_MAX'),
  (-4, 0, 'MALLOC_MMAP_MAX_'),
  (-1, -1, 'MALLOC_TRIM_THRESHOLD_'),
  (-2, 2**28, 'MALLOC_TOP_PAD_'),
)
ENVIRONMENT = {name: str(value) for _, value, name in _SETTINGS}


def keep_memory() -> bool:
  """Has this process keep the memory that it frees, for its next step; whether it does.

  To be called before a backend starts. Only where processors alone can be meant (there is no plugin
  of an accelerator, or JAX_PLATFORMS says 'cpu'), the C library is glibc, and the environment does
  not settle its malloc already (MALLOC_*, GLIBC_TUNABLES).
  """
  settled = any(name.startswith(('MALLOC_', 'GLIBC_TUNABLES')) for name in os.environ)
  if settled or not sys.platform.startswith('linux') or not _on_processor():
    return False
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is None or not hasattr(ctypes.CDLL(None), 'gnu_get_libc_version'):
    return False
  return all(mallopt(parameter, value) == 1 for parameter, value, _ in _SETTINGS)


def _on_processor() -> bool:
  platforms = os.environ.get('JAX_PLATFORMS')
  if platforms:
    return platforms.partition(',')[0] == 'cpu'
  return not any(importlib.util.find_spec(name) for name in ('jax_plugins', 'libtpu'))
