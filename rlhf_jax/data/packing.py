"""Which texts are read together in one row, decided on the host from their lengths."""

from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.common.types import Packing

# On the host arrays are numpy's.
Array = Any

# Rows come in multiples of this part of the texts, so that there are few shapes to compile.
_PARTS = 8


class Packer(NamedTuple):
  """How the rows of a batch are read.

  Attributes:
    microbatches: in so many parts, row b in part b mod their number.
    devices: a part in blocks of neighbours by so many devices.
  """

  microbatches: int = 1
  devices: int = 1

  def pack(self, lengths: Array, width: int) -> Packing:
    """Packs the texts of a batch, each block of a device's texts by itself.

    Args:
      lengths: `[B]` real tokens of each text, at most `width`.
      width: columns of a row.

    Raises:
      ValueError: the blocks do not have the same number of texts, or a text is too long.
    """
    blocks = self.microbatches * self.devices
    count = len(lengths)
    if count % blocks or lengths.max(initial=0) > width:
      raise ValueError(
        f'{count} texts of up to {lengths.max(initial=0)} tokens in {blocks} blocks.'
      )
    records = count // blocks
    # [devices, records, microbatches] -> the numbers of each block's texts, [blocks, records].
    numbers = np.arange(count).reshape(self.devices, records, self.microbatches)
    row, start = np.zeros(count, np.int32), np.zeros(count, np.int32)
    for block in numbers.swapaxes(1, 2).reshape(blocks, records):
      row[block], start[block] = first_fit(lengths[block], width)
    part = -(-records // _PARTS)
    rows = min(-(-(int(row.max()) + 1) // part) * part, records)
    return Packing(row, start, records, rows, width)


def first_fit(lengths: Array, width: int) -> tuple[Array, Array]:
  """First fit of decreasing lengths: at most 11/9 of the fewest rows, and 4 (Johnson et al. 1974).

  Args:
    lengths: `[N]`, at most `width`.
    width: room of a row.

  Returns:
    `[N]` rows and `[N]` first columns.
  """
  room = np.full(len(lengths), width)
  row, start = np.zeros(len(lengths), np.int32), np.zeros(len(lengths), np.int32)
  for number in np.argsort(-lengths, kind='stable'):
    row[number] = place = np.argmax(room >= lengths[number])
    start[number] = width - room[place]
    room[place] -= lengths[number]
  return row, start
