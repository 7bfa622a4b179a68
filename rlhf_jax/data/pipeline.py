"""Records to token columns, and columns to batches whose order is a function of (seed, step)."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.common.errors import DataError
from rlhf_jax.common.types import Sequences
from rlhf_jax.data.columns import Array, Batch, Columns, Ragged
from rlhf_jax.data.config import DataConfig
from rlhf_jax.data.packing import Packer
from rlhf_jax.data.texts import encode_contexts, encode_replies
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.feedback.dialogues import Context, Reply
from rlhf_jax.feedback.records import (
  Comparison,
  Demonstration,
  Prompt,
  Ranking,
  Rating,
  StepRating,
)


def encode(kind: str, records: Sequence[Any], tokenizer: Tokenizer, config: DataConfig) -> Columns:
  """Records of a kind (one of `feedback.dataset.KINDS`) as columns, by its encoder below."""
  return ENCODERS[kind](records, tokenizer, config)


def encode_prompts(records: Sequence[Prompt], tokenizer: Tokenizer, config: DataConfig) -> Columns:
  """Prompts as columns; batches are `Prompts`."""
  columns = _columns('prompts', [record.text for record in records], [], tokenizer, config)
  return dataclasses.replace(columns, slots=np.zeros((len(records), 0), np.int64))


def encode_demonstrations(
  records: Sequence[Demonstration], tokenizer: Tokenizer, config: DataConfig
) -> Columns:
  """Demonstrations as columns; batches are `Sequences`.

  Where a response is the rest of a dialogue, or begins with what its template writes for the
  assistant, they have a `loss_mask`.
  """
  prompts = [record.prompt for record in records]
  responses = [[record.response] for record in records]
  return _columns('demonstrations', prompts, responses, tokenizer, config)


def encode_comparisons(
  records: Sequence[Comparison], tokenizer: Tokenizer, config: DataConfig
) -> Columns:
  """Comparisons as columns; batches are `Pairs`. Pairs that the cut made identical are counted."""
  prompts = [record.prompt for record in records]
  responses = [(record.chosen, record.rejected) for record in records]
  columns = _columns('comparisons', prompts, responses, tokenizer, config)
  columns = dataclasses.replace(columns, slots=np.arange(2 * len(records)).reshape(-1, 2))
  return columns.attach(
    preference=np.array([record.preference for record in records], np.float32),
    margin=np.array([record.margin for record in records], np.float32),
  ).count(identical_pairs=columns.identical())


def encode_ratings(records: Sequence[Rating], tokenizer: Tokenizer, config: DataConfig) -> Columns:
  """Ratings as columns; batches are `Ratings`."""
  prompts = [record.prompt for record in records]
  responses = [[record.response] for record in records]
  columns = _columns('ratings', prompts, responses, tokenizer, config)
  return columns.attach(score=np.array([record.score for record in records], np.float32))


def encode_rankings(
  records: Sequence[Ranking], tokenizer: Tokenizer, config: DataConfig
) -> Columns:
  """Rankings as columns; batches are `Rankings` with K the most responses that any of them has.

  Shorter ones repeat their first response, with its rank, where `mask` is False. Rankings with
  responses that the cut made identical are counted.
  """
  prompts = [record.prompt for record in records]
  responses = [record.responses for record in records]
  columns = _columns('rankings', prompts, responses, tokenizer, config)
  counts = np.array([len(record.responses) for record in records], np.int64)[:, None]
  place = np.arange(counts.max(initial=0))
  mask = place < counts
  slots = counts.cumsum(0) - counts + np.where(mask, place, 0)
  ranks = np.array([rank for record in records for rank in record.ranks], np.int32)
  columns = dataclasses.replace(columns, slots=slots)
  return columns.attach(rank=ranks[slots], mask=mask).count(identical_responses=columns.identical())


def encode_step_ratings(
  records: Sequence[StepRating], tokenizer: Tokenizer, config: DataConfig
) -> Columns:
  """Step ratings as columns; batches are `StepRatings`. Steps that were cut off are counted.

  The tokens are those of the whole response. A step ends with the last token that has a part of it,
  so that a token which a step shares with the separator behind it is the step's.

  Raises:
    DataError: the tokenizer gives two steps the same last token.
  """
  prompts = [record.prompt for record in records]
  responses = [[record.response] for record in records]
  starts: list[list[int]] = []
  columns = _columns('step_ratings', prompts, responses, tokenizer, config, starts)
  shape = (len(records), config.response_length)
  score, mask, cut = np.zeros(shape, np.float32), np.zeros(shape, bool), 0
  for row, (record, begin) in enumerate(zip(records, starts, strict=True)):
    last = _last_tokens(record, begin)
    scores = np.array(record.scores, np.float32)[last < config.response_length]
    kept = last[: len(scores)]
    score[row, kept], mask[row, kept] = scores, True
    cut += len(last) - len(kept)
  return columns.attach(score=score, score_mask=mask).count(steps_cut=cut)


def _last_tokens(record: StepRating, starts: Sequence[int]) -> Array:
  """`[steps]`: the numbers of the tokens that steps end with, from where each token starts."""
  lengths = np.array([len(step) for step in record.steps])
  ends = (lengths + len(record.separator)).cumsum() - len(record.separator)
  last = np.searchsorted(starts, ends) - 1
  shared = np.flatnonzero(np.diff(last, prepend=-1) <= 0)
  if shared.size:
    raise DataError(
      f'step ratings, prompt {record.prompt!r:.60}: step {shared[0] + 1}, '
      f'{record.steps[shared[0]]!r:.60}, has no last token of its own. Separate steps by a text '
      f'(separator, now {record.separator!r}) that the tokenizer does not join them across.'
    )
  return last


def _columns(
  kind: str,
  contexts: Sequence[Context],
  replies: Sequence[Sequence[Reply]],
  tokenizer: Tokenizer,
  config: DataConfig,
  starts: list[list[int]] | None = None,
) -> Columns:
  """Columns with one response a row; `replies` are those to each of `contexts`, if any.

  Into `starts` goes, for each response, the number of its character with which each token starts.
  """
  prompts = encode_contexts(contexts, tokenizer, config)
  said = encode_replies(prompts, replies, tokenizer, with_starts=starts is not None)
  if starts is not None:
    starts += [one.starts for one in said]
  limit = config.response_length
  partly = any(one.imitated is not None and not all(one.imitated[:limit]) for one in said)
  return Columns(
    kind=kind,
    prompts=Ragged.of([prompt.ids for prompt in prompts]),
    responses=Ragged.of([one.ids[:limit] for one in said]),
    slots=np.arange(len(prompts)),
    prompt_length=config.prompt_length,
    response_length=limit,
    pad_id=tokenizer.pad_id,
    extras={},
    statistics={
      'rows': len(prompts),
      'prompts_cut': sum(prompt.cut > 0 for prompt in prompts),
      'responses_cut': sum(len(one.ids) > limit for one in said),
    },
    imitated=Ragged.of([one.counted[:limit] for one in said]) if partly else None,
    share_prompts=config.share_prompts,
    buckets=config.length_buckets,
  )


ENCODERS: Mapping[str, Callable[[Sequence[Any], Tokenizer, DataConfig], Columns]] = {
  'prompts': encode_prompts,
  'demonstrations': encode_demonstrations,
  'comparisons': encode_comparisons,
  'ratings': encode_ratings,
  'rankings': encode_rankings,
  'step_ratings': encode_step_ratings,
}


@dataclasses.dataclass(frozen=True)
class Batches:
  """Batches of columns without end; `batch` is random access.

  Attributes:
    columns: what they hold.
    order: `order[step]` are the `[B]` row numbers of a step.
    places: `[L]`, which of these rows are made; None: all.
    packer: packs the texts of a batch; None: each has a row to itself.
  """

  columns: Columns
  order: Any
  places: Array | None = None
  packer: Packer | None = None

  def batch(self, step: int) -> Batch:
    """The batch of a step: a function of the columns, the batch size, the seed and the step."""
    rows = self.order[step]
    batch = self.columns.take(rows, self.places)
    if self.packer is None:
      return batch
    assert isinstance(batch, Sequences), 'demonstrations are packed'
    width = batch.prompt.shape[-1] + batch.response.shape[-1]
    packing = self.packer.pack(self.columns.lengths[rows].sum(1), width)
    if self.places is not None:
      packing = dataclasses.replace(
        packing, row=packing.row[self.places], start=packing.start[self.places]
      )
    return dataclasses.replace(batch, packing=packing)


@dataclasses.dataclass(frozen=True)
class _Drawn:
  """Row numbers drawn with replacement: row i where a uniform falls below `cumulative[i]` first."""

  cumulative: Array
  batch_size: int
  seed: int

  def __getitem__(self, step: int) -> Array:
    uniform = np.random.default_rng([self.seed, step]).random(self.batch_size)
    return np.searchsorted(self.cumulative, uniform, side='right')


class _Grouped:
  """Row numbers of another order, the rows of every few batches put together by their sizes.

  Which of these batches comes when is drawn, so that no window begins with its shortest.
  """

  def __init__(self, order: Any, window: int, sizes: Array, seed: int):
    self.order, self.window, self.sizes, self.seed = order, window, sizes, seed
    self.batches = functools.lru_cache(maxsize=2)(self._batches)

  def __getitem__(self, step: int) -> Array:
    number, place = divmod(step, self.window)
    return self.batches(number)[place]

  def _batches(self, number: int) -> Array:
    """`[window, B]` row numbers."""
    steps = range(number * self.window, (number + 1) * self.window)
    drawn = np.stack([self.order[step] for step in steps])
    rows = drawn.ravel()
    groups = np.stack(by_size(self.sizes[rows], self.window))
    return np.random.default_rng([self.seed, number]).permutation(rows[groups])


def by_size(sizes: Array, count: int) -> list[Array]:
  """Parts rows of given sizes into equal groups of little padding, by one best cut after another.

  Args:
    sizes: `[N, 2]`; a row of a group is as large as the largest of the group, in each of the two.
    count: how many groups; it divides N.

  Returns:
    the numbers of the rows of each group.
  """
  each = len(sizes) // count
  found, whole = [], [np.arange(len(sizes))]
  while whole:
    rows = whole.pop()
    if len(rows) == each:
      found.append(rows)
      continue
    orders = [rows[np.argsort(sizes[rows, axis], kind='stable')] for axis in range(2)]
    cuts = np.arange(each, len(rows), each)
    costs = []
    for order in orders:
      near = np.maximum.accumulate(sizes[order])[cuts - 1].sum(1)
      far = np.maximum.accumulate(sizes[order[::-1]])[::-1][cuts].sum(1)
      costs.append(cuts * near + (len(rows) - cuts) * far)
    axis, best = np.unravel_index(np.argmin(costs), (2, len(cuts)))
    whole += np.split(orders[axis], [cuts[best]])
  return found


def batches(
  columns: Columns,
  batch_size: int,
  seed: int,
  weights: Array | None = None,
  places: Array | None = None,
  *,
  window: int = 1,
  packer: Packer | None = None,
) -> Batches:
  """Batches in an order that grain shuffles anew every epoch; a batch may straddle two epochs.

  With `weights` `[N]`, rows are drawn with replacement instead, each with a probability in
  proportion to its weight (A-LoL's sampling by priority: Baheti et al. 2024). With `places` `[L]`,
  only these of a step's rows are made: those of one process of several. With a `window` the rows of
  so many batches are put together by their widths. A `packer` packs texts.

  Raises:
    DataError: there are no rows, or all of them have weight 0.
    ValueError: the weights are not one finite number >= 0 a row.
  """
  if not len(columns):
    raise DataError('There are no rows to make batches of.')
  order: Any
  if weights is not None:
    order = _Drawn(_cumulative(weights, len(columns)), batch_size, seed)
  else:
    import grain

    order = grain.MapDataset.range(len(columns)).seed(seed).shuffle().repeat().batch(batch_size)
  if window > 1:
    order = _Grouped(order, window, columns.sizes, seed)
  return Batches(columns, order, places, packer)


def _cumulative(weights: Array, rows: int) -> Array:
  weights = np.asarray(weights, np.float64)
  if weights.shape != (rows,):
    raise ValueError(f'weights: expected one for each of {rows} rows, got shape {weights.shape}.')
  bad = np.flatnonzero(~((weights >= 0) & (weights < np.inf)))
  if bad.size:
    raise ValueError(f'weights: expected finite numbers >= 0, got {weights[bad[0]]} at {bad[0]}.')
  if not weights.any():
    raise DataError('All rows have weight 0, so that there is none to draw.')
  total = (weights / weights.max()).cumsum()
  return total / total[-1]


def sequential(columns: Columns, batch_size: int) -> Iterator[tuple[Batch, Array]]:
  """Every row once, in order, with `[B]` bool: False where the last batch begins again."""
  for start in range(0, len(columns), batch_size):
    rows = np.arange(start, start + batch_size)
    yield columns.take(rows % len(columns)), rows < len(columns)
