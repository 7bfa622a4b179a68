"""Records to token columns, and columns to batches whose order is a function of (seed, step)."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rlhf_jax.common.errors import DataError
from rlhf_jax.common.types import Pairs, Prompts, Sequences
from rlhf_jax.data.config import DataConfig
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.feedback.records import Comparison, Demonstration, Prompt

# Batches are declared for jax arrays; here, on the host, they hold numpy ones.
Array = Any
Batch = Prompts | Sequences | Pairs


@dataclasses.dataclass(frozen=True)
class Ragged:
  """Rows of different lengths, end to end: row i is `values[offsets[i]:offsets[i + 1]]`."""

  values: Array
  offsets: Array

  @classmethod
  def of(cls, rows: Sequence[Sequence[int]]) -> 'Ragged':
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = np.fromiter((token for row in rows for token in row), np.int32, int(offsets[-1]))
    return cls(values, offsets)

  def take(self, rows: Array, width: int, pad: int, *, left: bool) -> tuple[Array, Array]:
    """`[...]` row numbers -> int32 tokens and bool mask `[..., width]`, padded on one side."""
    lengths = np.diff(self.offsets)[rows][..., None]
    column = np.arange(width) - (width - lengths if left else 0)
    mask = (column >= 0) & (column < lengths)
    index = np.where(mask, self.offsets[rows][..., None] + column, 0)
    return np.where(mask, self.values[index], pad).astype(np.int32), mask


@dataclasses.dataclass(frozen=True)
class Columns:
  """Tokenized records in memory: `N` rows of one prompt and 0, 1 or 2 responses each.

  Attributes:
    prompts: the prompts' tokens.
    responses: the responses' tokens, row after row: all of row 0, then all of row 1.
    responses_per_row: 0 for prompts, 1 for demonstrations, 2 (chosen first) for comparisons.
    prompt_length: P, to which prompts are padded.
    response_length: R, to which responses are padded.
    pad_id: what they are padded with.
    extras: further `[N, ...]` arrays by field of the batch, e.g. `reference_logprobs`.
    statistics: counts worth telling: rows, prompts and responses that were cut, pairs that the cut
      has made identical.
  """

  prompts: Ragged
  responses: Ragged
  responses_per_row: int
  prompt_length: int
  response_length: int
  pad_id: int
  extras: dict[str, Array]
  statistics: dict[str, int]

  def __len__(self) -> int:
    return len(self.prompts.offsets) - 1

  def attach(self, **extras: Array) -> 'Columns':
    """The same rows with further fields of their batches; raises ValueError for a wrong length."""
    for name, array in extras.items():
      if len(array) != len(self):
        raise ValueError(f'{name}: expected {len(self)} rows, got shape {array.shape}.')
    return dataclasses.replace(self, extras={**self.extras, **extras})

  def take(self, rows: Array) -> Batch:
    """`[B]` row numbers -> the batch with these rows, as numpy arrays."""
    tokens, mask = self.prompts.take(rows, self.prompt_length, self.pad_id, left=True)
    extras = {name: array[rows] for name, array in self.extras.items()}
    if self.responses_per_row == 0:
      return Prompts(tokens, mask, rows.astype(np.int32), **extras)
    if self.responses_per_row == 1:
      return Sequences(tokens, mask, *self._responses(rows), **extras)
    tokens, mask = (np.repeat(x[:, None], 2, axis=1) for x in (tokens, mask))
    pairs = Sequences(tokens, mask, *self._responses(2 * rows[:, None] + np.arange(2)))
    return Pairs(pairs, **extras)

  def _responses(self, rows: Array) -> tuple[Array, Array]:
    return self.responses.take(rows, self.response_length, self.pad_id, left=False)


def encode_prompts(records: Sequence[Prompt], tokenizer: Tokenizer, config: DataConfig) -> Columns:
  """Prompts as columns; batches are `Prompts`."""
  return _columns([record.text for record in records], [], tokenizer, config)


def encode_demonstrations(
  records: Sequence[Demonstration], tokenizer: Tokenizer, config: DataConfig
) -> Columns:
  """Demonstrations as columns; batches are `Sequences`."""
  prompts = [record.prompt for record in records]
  return _columns(prompts, [record.response for record in records], tokenizer, config)


def encode_comparisons(
  records: Sequence[Comparison], tokenizer: Tokenizer, config: DataConfig
) -> Columns:
  """Comparisons as columns; batches are `Pairs`."""
  responses = [text for record in records for text in (record.chosen, record.rejected)]
  columns = _columns([record.prompt for record in records], responses, tokenizer, config)
  values, offsets = columns.responses.values, columns.responses.offsets
  ends = zip(offsets[:-2:2], offsets[1:-1:2], offsets[2::2], strict=True)
  same = sum(np.array_equal(values[a:b], values[b:c]) for a, b, c in ends)
  return dataclasses.replace(
    columns.attach(
      preference=np.array([record.preference for record in records], np.float32),
      margin=np.array([record.margin for record in records], np.float32),
    ),
    statistics={**columns.statistics, 'identical_pairs': same},
  )


def _columns(
  prompts: list[str], responses: list[str], tokenizer: Tokenizer, config: DataConfig
) -> Columns:
  begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  room = config.prompt_length - len(begin)
  encoded = tokenizer.encode_batch(prompts)
  kept = [begin + _cut(row, room, config.truncation) for row in encoded]
  for text, row in zip(prompts, kept, strict=True):
    if not row:
      raise DataError(
        f'prompt {text!r}: no tokens, and the tokenizer has no <bos> to begin with. Give prompts '
        'that are not empty, or a tokenizer with a bos_token.'
      )
  ended = [[*row, tokenizer.eos_id] for row in tokenizer.encode_batch(responses)]
  limit = config.response_length
  return Columns(
    prompts=Ragged.of(kept),
    responses=Ragged.of([row[:limit] for row in ended]),
    responses_per_row=len(responses) // max(len(prompts), 1),
    prompt_length=config.prompt_length,
    response_length=limit,
    pad_id=tokenizer.pad_id,
    extras={},
    statistics={
      'rows': len(prompts),
      'prompts_cut': sum(len(row) > room for row in encoded),
      'responses_cut': sum(len(row) > limit for row in ended),
    },
  )


def _cut(tokens: list[int], room: int, truncation: str) -> list[int]:
  if len(tokens) <= room:
    return tokens
  return tokens[-room:] if truncation == 'keep_end' else tokens[:room]


@dataclasses.dataclass(frozen=True)
class Batches:
  """Shuffled batches of columns, for as many epochs as are asked for; `batch` is random access."""

  columns: Columns
  order: Any

  def batch(self, step: int) -> Batch:
    """The batch of a step: a function of the columns, the batch size, the seed and the step."""
    return self.columns.take(self.order[step])


def batches(columns: Columns, batch_size: int, seed: int) -> Batches:
  """Batches in an order that grain shuffles anew every epoch; a batch may straddle two epochs.

  Raises:
    DataError: there are no rows.
  """
  import grain

  if not len(columns):
    raise DataError('There are no rows to make batches of.')
  order = grain.MapDataset.range(len(columns)).seed(seed).shuffle().repeat().batch(batch_size)
  return Batches(columns, order)


def sequential(columns: Columns, batch_size: int) -> Iterator[tuple[Batch, Array]]:
  """Every row once, in order, with `[B]` bool: False where the last batch repeats the last row."""
  for start in range(0, len(columns), batch_size):
    rows = np.arange(start, start + batch_size)
    yield columns.take(np.minimum(rows, len(columns) - 1)), rows < len(columns)
