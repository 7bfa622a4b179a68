"""A set of feedback: records to learn from, records held out, and what is known about them."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, overload

import numpy as np

from rlhf_jax.common.errors import DataError
from rlhf_jax.feedback.convert import CONVERTERS
from rlhf_jax.feedback.dialogues import Context, Dialogue, contents
from rlhf_jax.feedback.labelling import bayes_accuracy
from rlhf_jax.feedback.records import (
  Comparison,
  Demonstration,
  Prompt,
  Ranking,
  Rating,
  StepRating,
)

KINDS = ('prompts', 'demonstrations', 'comparisons', 'ratings', 'rankings', 'step_ratings')
R = TypeVar('R')


class Task(Protocol):
  """A task whose true reward is known."""

  name: str

  def gold_reward(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """`[N]` float64: the true reward of each response."""

  def vocabulary(self) -> Sequence[str]:
    """The words that its texts are made of."""


class Deferred(Sequence[R]):
  """Records that are made when they are first read; how many there are is known before."""

  def __init__(self, size: int, make: Callable[[], tuple[R, ...]], origin: str):
    """`origin` names all that `make` depends on: in a fingerprint it stands for the records."""
    self._size = size
    self._make = make
    self.origin = origin

  @functools.cached_property
  def _records(self) -> tuple[R, ...]:
    return self._make()

  def __len__(self) -> int:
    return self._size

  def __iter__(self) -> Iterator[R]:
    return iter(self._records)

  @overload
  def __getitem__(self, index: int) -> R: ...
  @overload
  def __getitem__(self, index: slice) -> tuple[R, ...]: ...
  def __getitem__(self, index: int | slice) -> R | tuple[R, ...]:
    return self._records[index]


@dataclasses.dataclass(frozen=True)
class Split:
  """Records of each kind; those that the source cannot give are empty."""

  prompts: tuple[Prompt, ...] = ()
  demonstrations: tuple[Demonstration, ...] = ()
  comparisons: tuple[Comparison, ...] = ()
  ratings: Sequence[Rating] = ()
  rankings: Sequence[Ranking] = ()
  step_ratings: Sequence[StepRating] = ()

  @property
  def sizes(self) -> dict[str, int]:
    """How many records there are of each kind that there is."""
    return {kind: len(getattr(self, kind)) for kind in KINDS if len(getattr(self, kind))}

  def texts(self, write: Callable[[Dialogue], str] = contents) -> Iterator[str]:
    """Every prompt and response, records in order, repeats included (to train a tokenizer).

    Dialogues are texts as `write` writes them. Deferred records are left out: the words of a task
    are known without them, and so a tokenizer depends on nobody's having read them.
    """

    def text(context: Context) -> str:
      return context if isinstance(context, str) else write(context)

    for prompt in self.prompts:
      yield text(prompt.text)
    for demonstration in self.demonstrations:
      if isinstance(demonstration.response, str):
        yield from (text(demonstration.prompt), demonstration.response)
      elif not isinstance(demonstration.prompt, str):
        yield write(demonstration.prompt + demonstration.response)
    for pair in self.comparisons:
      yield from (text(pair.prompt), pair.chosen, pair.rejected)
    if not isinstance(self.ratings, Deferred):
      for rating in self.ratings:
        yield from (text(rating.prompt), rating.response)
    if not isinstance(self.rankings, Deferred):
      for ranking in self.rankings:
        yield from (text(ranking.prompt), *ranking.responses)
    if not isinstance(self.step_ratings, Deferred):
      for steps in self.step_ratings:
        yield from (text(steps.prompt), steps.response)

  def converted(self, name: str) -> 'Split':
    """The split with what the converter `name` gives instead of its own records of that kind."""
    converter = CONVERTERS[name]
    made = converter.convert(getattr(self, converter.source))
    return dataclasses.replace(self, **{converter.target: made})


@dataclasses.dataclass(frozen=True)
class Feedback:
  """What a source gives.

  Attributes:
    source: its name, for messages.
    train: records to learn from.
    held_out: records kept for evaluation.
    task: the task, where the true reward is known.
    label_probability: `[N]`, how likely each label of `held_out.comparisons` was, where known.
    quarantined: how many bad records were set aside.
    damage: what is said of files that are damaged from some line on.
    unconverted: what there was to learn from before a converter was applied, so that stages with
      different converters have one tokenizer; None where none was.
  """

  source: str
  train: Split
  held_out: Split
  task: Task | None = None
  label_probability: np.ndarray | None = None
  quarantined: int = 0
  damage: tuple[str, ...] = ()
  unconverted: Split | None = None

  def bayes_accuracy(self, count: int | None = None) -> float | None:
    """The best accuracy any judge can have on the first held-out comparisons, where known."""
    known = self.label_probability
    return None if known is None or not known.size else bayes_accuracy(known[:count])

  def require(self, split: str, kind: str, instead: str = '') -> tuple[Any, ...]:
    """`train` or `held_out` records of a kind; raises DataError where the source has none.

    `instead` says how to do without them, where they come second. A converter is then none of the
    ways if there is one already: it would be in the place of that.
    """
    side: Split = getattr(self, split)
    records = getattr(side, kind)
    if len(records):
      return tuple(records)
    taken = instead and self.unconverted is not None
    remedy = instead if taken else f'{self._remedy(split, kind)} {instead}'.rstrip()
    raise DataError(f'{self.source}: no {split} {kind}; found {side.sizes}. {remedy}')

  def _remedy(self, split: str, kind: str) -> str:
    if split == 'held_out' and len(getattr(self.train, kind)):
      return 'Raise --config.data.held_out, or name files or splits with more records.'
    ways = {
      name: converter.source
      for name, converter in CONVERTERS.items()
      if converter.target == kind and converter.source in self.train.sizes
    }
    other = f'Name a source that has {kind}'
    if ways:
      options = ' or '.join(
        f'--config.data.convert={name} (from {source})' for name, source in ways.items()
      )
      return f'{other}, or make them: {options}.'
    return f'{other}: no converter makes them from what this one has.'

  def converted(self, name: str) -> 'Feedback':
    """The feedback with the converter `name` applied to both sides.

    Raises:
      DataError: there is nothing to learn from that it reads, or nothing comes of it.
    """
    converter = CONVERTERS[name]
    setting = f'--config.data.convert={name}'
    sizes = self.train.sizes
    if converter.source not in sizes:
      ways = [other for other, way in CONVERTERS.items() if way.source in sizes]
      remedy = f'or a converter of what there is: {", ".join(ways)}' if ways else 'or no converter'
      raise DataError(
        f'{self.source}: {setting} reads {converter.source}; found {sizes}. '
        f'Name a source that has {converter.source}, {remedy}.'
      )
    train = self.train.converted(name)
    if not len(getattr(train, converter.target)):
      raise DataError(
        f'{self.source}: {setting} makes no {converter.target} of {sizes[converter.source]} '
        f'{converter.source}. {converter.lost}'.rstrip()
      )
    return dataclasses.replace(
      self,
      train=train,
      held_out=self.held_out.converted(name),
      # It was that of the comparisons that are replaced.
      label_probability=None if converter.target == 'comparisons' else self.label_probability,
    )

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 over all records in order: equal content has equal fingerprints.

    Of deferred records, what they are made from counts.
    """
    digest = hashlib.sha256()
    for split in (self.train, self.held_out):
      for kind in KINDS:
        digest.update(f'{kind}\n'.encode())
        records = getattr(split, kind)
        if isinstance(records, Deferred):
          digest.update(records.origin.encode() + b'\n')
          continue
        for record in records:
          digest.update(json.dumps(record.to_dict()).encode() + b'\n')
    return digest.hexdigest()
