"""Flags that several of the programs have."""

import jax
from absl import flags

from benchmarks import measuring, peer, workloads
from rlhf_jax.common.errors import UserError

SIZE = flags.DEFINE_enum('size', 'SMALL', list(workloads.SIZES), 'Of the decoder.')
DTYPE = flags.DEFINE_enum(
  'dtype', None, ['float32', 'bfloat16'], 'Of computation; default: that of the size.'
)
REPEATS = flags.DEFINE_integer('repeats', 5, 'Steps that are timed, after the first.', 1)
PEER = flags.DEFINE_enum('peer', None, list(peer.LIBRARIES), 'Does the same, in turn with us.')
PEER_PYTHON = flags.DEFINE_string(
  'peer_python', None, 'The interpreter of an environment that has the peer.'
)


def dtype() -> str:
  """The type of computation that is asked for."""
  return workloads.SIZES[SIZE.value].compute_dtype if DTYPE.value is None else DTYPE.value


def skipped() -> str | None:
  """Why nothing is timed here, as is said to the user; None: it is."""
  if SIZE.value not in workloads.LARGE or measuring.backend() != 'cpu':
    return None
  others = ', '.join(f'--size={size}' for size in workloads.SIZES if size not in workloads.LARGE)
  return f'--size={SIZE.value}: skipped, it needs an accelerator; a processor can do {others}.'


def library() -> peer.Library | None:
  """The peer that is asked for; raises UserError for flags of it that do not fit."""
  if (PEER.value is None) != (PEER_PYTHON.value is None):
    raise UserError('--peer, --peer_python: give both, or neither.')
  if PEER.value is not None and dtype() != 'float32':
    raise UserError(f'--dtype={dtype()}: expected float32 with --peer, which computes in it.')
  if PEER.value is not None and jax.default_backend() != 'cpu':
    raise UserError(
      '--peer: it computes on the processor, and we on another device. Set JAX_PLATFORMS=cpu.'
    )
  return None if PEER.value is None else peer.LIBRARIES[PEER.value]
