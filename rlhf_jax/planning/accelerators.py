"""What named accelerators have: a table of data sheets."""

from typing import NamedTuple

from rlhf_jax.common.errors import UserError


class Accelerator(NamedTuple):
  """One device, as its data sheet has it.

  Attributes:
    memory: bytes.
    flops: bfloat16 multiplications and additions a second, without sparsity.
    bandwidth: bytes a second between the device and its memory.
    link: bytes a second that the device sends to its neighbours, one way, all links together: half
      of what data sheets call bidirectional. Devices in other nodes are slower.
    source: where the numbers are from.
    backend: jax's name for what runs there.
    widest_head: of cuDNN's attention; see `attending`.
  """

  memory: float
  flops: float
  bandwidth: float
  link: float
  source: str
  backend: str
  widest_head: int = 256


_GB, _GIB, _TERA = 1e9, 2.0**30, 1e12
_NVIDIA = 'NVIDIA data sheet of the'
_TPU = 'cloud.google.com/tpu/docs'

ACCELERATORS = {
  'A100': Accelerator(
    80 * _GB, 312e12, 2.039 * _TERA, 300 * _GB, f'{_NVIDIA} A100 80GB SXM', 'gpu', 128
  ),
  'H100': Accelerator(80 * _GB, 989e12, 3.35 * _TERA, 450 * _GB, f'{_NVIDIA} H100 SXM', 'gpu'),
  'H200': Accelerator(141 * _GB, 989e12, 4.8 * _TERA, 450 * _GB, f'{_NVIDIA} H200 SXM', 'gpu'),
  'B200': Accelerator(
    180 * _GB, 2250e12, 8.0 * _TERA, 900 * _GB, f'{_NVIDIA} HGX B200, 1 of 8', 'gpu'
  ),
  'v5e': Accelerator(16 * _GIB, 197e12, 819 * _GB, 200 * _GB, f'{_TPU}/v5e', 'tpu'),
  'v5p': Accelerator(95 * _GIB, 459e12, 2765 * _GB, 600 * _GB, f'{_TPU}/v5p', 'tpu'),
  'v6e': Accelerator(32 * _GIB, 918e12, 1600 * _GB, 400 * _GB, f'{_TPU}/v6e', 'tpu'),
}


def judged(name: str | None) -> dict[str, Accelerator]:
  """The row of that name, None: all of the table; raises UserError for a name that it lacks."""
  found = {
    known: row
    for known, row in ACCELERATORS.items()
    if name is None or known.lower() == name.lower()
  }
  if not found:
    raise UserError(f'--accelerator={name}: the table has {", ".join(ACCELERATORS)}.')
  return found
