"""The same bits each time: what has to be settled before a backend starts.

docs/reproducibility.md says what is the same to the bit, where, and what is so to float error only.
"""

import os

import jax
from jax._src import xla_bridge

from rlhf_jax.common.errors import RunError

# Atomic additions in an order of the moment make scatters, and the gradients of lookups, differ
# from run to run on GPUs; this has XLA take other kernels. (openxla.org/xla/determinism)
FLAG = '--xla_gpu_exclude_nondeterministic_ops=true'


def require() -> None:
  """Has programs give the same bits each time they run on the same devices.

  Raises RunError on a GPU that is in use already, where it is too late.
  """
  if _asked():
    return
  if not xla_bridge.backends_are_initialized():  # nothing public tells
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {FLAG}'.strip()
  elif jax.default_backend() == 'gpu':
    raise RunError(
      f'deterministic: the GPU is in use already, without {FLAG}. Set it in XLA_FLAGS from the '
      'start, or --config.deterministic=False.'
    )


def holds() -> bool:
  """Whether programs of this process give the same bits each time."""
  return _asked() or jax.default_backend() != 'gpu'


def _asked() -> bool:
  return FLAG in os.environ.get('XLA_FLAGS', '').split()
