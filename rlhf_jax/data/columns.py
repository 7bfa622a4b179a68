"""Tokenized records in memory, and the batches that rows of them make."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.common.types import Pairs, Prompts, Rankings, Ratings, Sequences, StepRatings

# Batches are declared for jax arrays; here, on the host, they hold numpy ones.
Array = Any
Batch = Prompts | Sequences | Pairs | Ratings | Rankings | StepRatings

# The batches that hold something beside their sequences, by kind of record.
JUDGED: dict[str, type[Pairs | Ratings | Rankings | StepRatings]] = {
  'comparisons': Pairs,
  'ratings': Ratings,
  'rankings': Rankings,
  'step_ratings': StepRatings,
}


@dataclasses.dataclass(frozen=True)
class Ragged:
  """Rows of different lengths, end to end: row i is `values[offsets[i]:offsets[i + 1]]`."""

  values: Array
  offsets: Array

  @classmethod
  def of(cls, rows: Sequence[Sequence[int]]) -> 'Ragged':
    """Rows given as lists."""
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = np.fromiter((token for row in rows for token in row), np.int32, int(offsets[-1]))
    return cls(values, offsets)

  def select(self, rows: Array) -> 'Ragged':
    """The rows of these numbers, in this order."""
    starts, ends = self.offsets[:-1][rows], self.offsets[1:][rows]
    return Ragged.of([self.values[start:end] for start, end in zip(starts, ends, strict=True)])

  def take(self, rows: Array, width: int, pad: int, *, left: bool) -> tuple[Array, Array]:
    """`[...]` row numbers -> int32 tokens and bool mask `[..., width]`, padded on one side."""
    lengths = np.diff(self.offsets)[rows][..., None]
    column = np.arange(width) - (width - lengths if left else 0)
    mask = (column >= 0) & (column < lengths)
    index = np.where(mask, self.offsets[rows][..., None] + column, 0)
    return np.where(mask, self.values[index], pad).astype(np.int32), mask


@dataclasses.dataclass(frozen=True)
class Columns:
  """Tokenized records of one kind: `N` rows of a prompt and none, one or K responses each.

  Attributes:
    kind: of the records, as in `feedback.dataset.KINDS`; it says which batches they make.
    prompts: the prompts' tokens.
    responses: the responses' tokens.
    slots: which of `responses` belong to a row: `[N]`, or `[N, K]` where it has several. Prompts
      have none: `[N, 0]`.
    prompt_length: P, to which prompts are padded.
    response_length: R, to which responses are padded.
    pad_id: what they are padded with.
    extras: further `[N, ...]` arrays by field of the batch, e.g. `reference_logprobs`.
    statistics: counts worth telling: rows, prompts and responses that were cut, and what that has
      made useless.
    imitated: of each response's tokens, 1 where they are imitated and 0 elsewhere (a batch's
      `loss_mask`); None where all are.
    share_prompts: whether a batch has the prompt of several responses once.
    buckets: how many widths there are of prompts and of responses; a batch takes the least of them
      that holds its rows.
  """

  kind: str
  prompts: Ragged
  responses: Ragged
  slots: Array
  prompt_length: int
  response_length: int
  pad_id: int
  extras: dict[str, Array]
  statistics: dict[str, int]
  imitated: Ragged | None = None
  share_prompts: bool = False
  buckets: int = 1

  def __len__(self) -> int:
    return len(self.prompts.offsets) - 1

  def attach(self, **extras: Array) -> 'Columns':
    """The same rows with further fields of their batches; raises ValueError for a wrong length."""
    for name, array in extras.items():
      if len(array) != len(self):
        raise ValueError(f'{name}: expected {len(self)} rows, got shape {array.shape}.')
    return dataclasses.replace(self, extras={**self.extras, **extras})

  def select(self, rows: Array) -> 'Columns':
    """The rows of these numbers, in this order; statistics stay those of all."""
    return dataclasses.replace(
      self,
      prompts=self.prompts.select(rows),
      slots=self.slots[rows],
      extras={name: array[rows] for name, array in self.extras.items()},
    )

  def digest(self) -> str:
    """SHA-256 of the tokens of all rows, and of how they are padded and read."""
    shape = (self.kind, self.prompt_length, self.response_length, self.pad_id)
    how = (self.share_prompts, self.buckets)
    digest = hashlib.sha256(repr((*shape, *how)).encode())
    for ragged in (self.prompts, self.responses):
      digest.update(ragged.values.tobytes() + ragged.offsets.tobytes())
    digest.update(self.slots.tobytes())
    return digest.hexdigest()

  def count(self, **statistics: int) -> 'Columns':
    """The same rows with further statistics."""
    return dataclasses.replace(self, statistics={**self.statistics, **statistics})

  def identical(self) -> int:
    """How many rows have responses that are different records and the same tokens."""
    starts, ends = self.responses.offsets[:-1], self.responses.offsets[1:]
    found = 0
    for row in self.slots:
      slots = set(row.tolist())
      texts = {self.responses.values[starts[slot] : ends[slot]].tobytes() for slot in slots}
      found += len(texts) < len(slots)
    return found

  @functools.cached_property
  def lengths(self) -> Array:
    """`[N, 2]`: tokens of each row's prompt, and of its longest response."""
    longest = np.diff(self.responses.offsets)[self.slots]
    if longest.ndim == 2:
      longest = longest.max(1, initial=0)
    return np.stack([np.diff(self.prompts.offsets), longest], axis=1)

  @functools.cached_property
  def widths(self) -> Array:
    """`[N, 2]`: the least widths of prompts and of responses that hold each row."""
    full = np.array([self.prompt_length, self.response_length])
    parts = np.maximum(-(-self.lengths * self.buckets // full), 1)
    return -(-full * parts // self.buckets)

  @functools.cached_property
  def sizes(self) -> Array:
    """`[N, 2]`: the columns that a model reads of each row, for prompts and for responses."""
    copies = self.slots.shape[1] if self.slots.ndim == 2 else 1
    return self.widths * np.array([1 if self.share_prompts else copies, copies])

  def take(self, rows: Array, places: Array | None = None) -> Batch:
    """`[B]` row numbers -> the batch with these rows, as numpy arrays.

    With `places` `[L]` only these of the rows are made, as wide as the whole batch is.
    """
    whole, rows = rows, rows if places is None else rows[places]
    if self.kind == 'prompts':
      tokens, mask = self.prompts.take(rows, self.prompt_length, self.pad_id, left=True)
      return Prompts(tokens, mask, rows.astype(np.int32), **self._extras(rows))
    prompt, response = (int(width) for width in self.widths[whole].max(0))
    tokens, mask = self.prompts.take(rows, prompt, self.pad_id, left=True)
    slots = self.slots[rows]
    if slots.ndim == 2:
      copies = 1 if self.share_prompts else slots.shape[1]
      tokens, mask = (np.repeat(x[:, None], copies, axis=1) for x in (tokens, mask))
    responses = self.responses.take(slots, response, self.pad_id, left=False)
    sequences = Sequences(tokens, mask, *responses)
    extras = self._extras(rows, response)
    if self.kind == 'demonstrations':
      if self.imitated is not None:
        counted, _ = self.imitated.take(slots, response, 0, left=False)
        extras['loss_mask'] = counted.astype(bool)
      return dataclasses.replace(sequences, **extras)
    return JUDGED[self.kind](sequences, **extras)

  def _extras(self, rows: Array, response: int | None = None) -> dict[str, Array]:
    """The further fields of these rows; what is said of tokens as wide as their responses are."""
    extras = {name: array[rows] for name, array in self.extras.items()}
    by_token = {'reference_logprobs'}
    if self.kind == 'step_ratings':
      by_token |= {'score', 'score_mask'}
    for name in by_token & extras.keys():
      extras[name] = extras[name][..., :response]
    return extras
