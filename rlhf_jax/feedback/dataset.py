"""A set of feedback: records to learn from, records held out, and what is known about them."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from rlhf_jax.common.errors import DataError
from rlhf_jax.feedback.records import Comparison, Demonstration, Prompt

KINDS = ('prompts', 'demonstrations', 'comparisons')


class Task(Protocol):
  """A task whose true reward is known."""

  name: str

  def gold_reward(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """`[N]` float64: the true reward of each response."""

  def vocabulary(self) -> Sequence[str]:
    """The words that its texts are made of."""


@dataclasses.dataclass(frozen=True)
class Split:
  """Records of each kind; those that the source cannot give are empty."""

  prompts: tuple[Prompt, ...] = ()
  demonstrations: tuple[Demonstration, ...] = ()
  comparisons: tuple[Comparison, ...] = ()

  def texts(self) -> Iterator[str]:
    """Every prompt and response, records in order, repeats included (to train a tokenizer)."""
    for prompt in self.prompts:
      yield prompt.text
    for demonstration in self.demonstrations:
      yield from (demonstration.prompt, demonstration.response)
    for pair in self.comparisons:
      yield from (pair.prompt, pair.chosen, pair.rejected)


@dataclasses.dataclass(frozen=True)
class Feedback:
  """What a source gives.

  Attributes:
    source: its name, for messages.
    train: records to learn from.
    held_out: records kept for evaluation.
    task: the task, where the true reward is known.
    bayes_accuracy: the best accuracy any judge can have on `held_out.comparisons`, where known.
    quarantined: how many bad records were set aside.
  """

  source: str
  train: Split
  held_out: Split
  task: Task | None = None
  bayes_accuracy: float | None = None
  quarantined: int = 0

  def require(self, split: str, kind: str) -> tuple[Any, ...]:
    """`train` or `held_out` records of a kind; raises DataError where the source has none."""
    records = getattr(getattr(self, split), kind)
    if records:
      return records
    found = {name: len(getattr(getattr(self, split), name)) for name in KINDS}
    remedy = (
      'Raise --config.data.held_out, or name files or splits with more records.'
      if any(getattr(self.train, kind)) and split == 'held_out'
      else f'Name a source that has {kind}.'
    )
    raise DataError(f'{self.source}: no {split} {kind}; found {found}. {remedy}')

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 over all records in order: equal content has equal fingerprints."""
    digest = hashlib.sha256()
    for split in (self.train, self.held_out):
      for kind in KINDS:
        digest.update(f'{kind}\n'.encode())
        for record in getattr(split, kind):
          digest.update(json.dumps(record.to_dict()).encode() + b'\n')
    return digest.hexdigest()
