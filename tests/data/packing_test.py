"""Packing on the host: every text has its room, and nobody else's."""

import numpy as np
import pytest

from rlhf_jax.data.packing import Packer, first_fit


def overlaps(row: np.ndarray, start: np.ndarray, lengths: np.ndarray, width: int) -> bool:
  """Whether two texts share a place, or one goes beyond its row."""
  taken: set[tuple[int, int]] = set()
  for r, s, length in zip(row.tolist(), start.tolist(), lengths.tolist(), strict=True):
    places = {(r, column) for column in range(s, s + length)}
    if s + length > width or taken & places:
      return True
    taken |= places
  return False


@pytest.mark.parametrize('seed', range(5))
def test_texts_have_places_of_their_own(seed: int) -> None:
  """In at most 11/9 of the rows that their tokens fill, and one."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, 20, 60)
  row, start = first_fit(lengths, 20)
  assert not overlaps(row, start, lengths, 20)
  assert set(row) == set(range(row.max() + 1))
  halves = (lengths > 10).sum()
  assert row.max() + 1 <= 11 / 9 * max(-(-lengths.sum() // 20), halves) + 2


@pytest.mark.parametrize(('microbatches', 'devices'), [(1, 1), (2, 1), (1, 4), (3, 2)])
def test_blocks_are_the_rows_that_a_device_reads_at_a_time(microbatches: int, devices: int) -> None:
  """Row b is in microbatch b mod their number, whose neighbours are on one device."""
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 12, 48)
  packing = Packer(microbatches, devices).pack(lengths, 12)
  assert packing.records == 48 // (microbatches * devices)
  assert packing.width == 12 and packing.rows <= packing.records
  for part in range(microbatches):
    numbers = np.arange(part, 48, microbatches).reshape(devices, packing.records)
    for block in numbers:
      row, start = packing.row[block], packing.start[block]
      assert row.max() < packing.rows
      assert not overlaps(row, start, lengths[block], 12)


def test_there_are_few_shapes() -> None:
  """At most eight numbers of rows, whatever the lengths."""
  rng = np.random.default_rng(0)
  found = {Packer().pack(rng.integers(1, rng.integers(2, 17), 64), 16).rows for _ in range(200)}
  assert len(found) > 3 and all(rows % 8 == 0 and rows <= 64 for rows in found)


def test_what_cannot_be_packed_is_refused() -> None:
  with pytest.raises(ValueError, match='5 texts'):
    Packer(microbatches=2).pack(np.ones(5, int), 4)
  with pytest.raises(ValueError, match='up to 5 tokens'):
    Packer().pack(np.array([5, 1]), 4)
