"""From a data config to the feedback it names."""

import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from rlhf_jax.common.errors import DataError
from rlhf_jax.data import embedded, jsonl, tfds
from rlhf_jax.data.config import EMBEDDED, DataConfig
from rlhf_jax.data.rejects import Rejects
from rlhf_jax.feedback.dataset import Feedback, Split
from rlhf_jax.feedback.dialogues import Context, text_of
from rlhf_jax.feedback.records import (
  Comparison,
  Demonstration,
  Prompt,
  Ranking,
  Rating,
  Record,
  StepRating,
)

_KIND_OF: dict[type[Record], str] = {
  Prompt: 'prompts',
  Demonstration: 'demonstrations',
  Comparison: 'comparisons',
  Rating: 'ratings',
  Ranking: 'rankings',
  StepRating: 'step_ratings',
}


def load(config: DataConfig, quarantine: pathlib.Path | None = None) -> Feedback:
  """Reads or makes the feedback on texts that a validated config names.

  Args:
    config: the source and what to hold out.
    quarantine: where bad records go, with `on_error='quarantine'`.

  Returns:
    The feedback, converted where `convert` says so. From comparisons, demonstrations (prompt and
    chosen) derive where there are none; from any records, prompts (each once).

  Raises:
    DataError: the source is missing or empty, has a bad record, leaves nothing to learn from, or
      not what `convert` or `responses` needs.
  """
  if config.source == EMBEDDED:
    feedback = embedded.make(config.reviews, config.held_out, config.response_length)
  else:
    feedback = _from_records(config, quarantine)
  if config.convert:
    spoken = _complete(feedback.train, config.responses)
    feedback = dataclasses.replace(feedback.converted(config.convert), unconverted=spoken)
  if config.responses == 'preferred' and not feedback.train.comparisons:
    raise DataError(
      f"{feedback.source}: --config.data.responses='preferred' imitates the chosen responses of "
      f"comparisons; found {feedback.train.sizes}. Set 'chosen' to imitate demonstrations, or name "
      'a source or a converter (--config.data.convert) that gives comparisons.'
    )
  return dataclasses.replace(
    feedback,
    train=_complete(feedback.train, config.responses),
    held_out=_complete(feedback.held_out, config.responses),
  )


def _from_records(config: DataConfig, quarantine: pathlib.Path | None) -> Feedback:
  rejects = Rejects()
  kept, held_out = _read(config, rejects)
  quarantined = rejects.settle(config.on_error, quarantine)
  if held_out is None:
    kept, held_out = split_by_prompt(kept, config.held_out)
  if not kept:
    raise DataError(
      f'{config.source} {config.path}: no records to learn from ({quarantined} set aside, '
      f'{len(held_out)} held out). Lower --config.data.held_out, or mend the source.'
    )
  name = config.source if config.path is None else f'{config.source}:{config.path}'
  return Feedback(
    name, _split(kept), _split(held_out), quarantined=quarantined, damage=rejects.damage
  )


def split_by_prompt(
  records: Sequence[Record], held_out: float
) -> tuple[list[Record], list[Record]]:
  """Holds out a fraction (below 1) or a count of records; all records of a prompt stay together.

  Prompts are taken in the order of their SHA-256 until the number is reached: the choice depends
  on what the records say, not on their order, and moves little when records are added. Records
  without a prompt are taken one by one.
  """
  wanted = int(held_out) if held_out >= 1 else round(held_out * len(records))
  groups: dict[str, list[int]] = {}
  for row, record in enumerate(records):
    groups.setdefault(_digest(record), []).append(row)
  taken: set[int] = set()
  for digest in sorted(groups):
    if len(taken) >= wanted:
      break
    taken.update(groups[digest])
  kept = [record for row, record in enumerate(records) if row not in taken]
  return kept, [records[row] for row in sorted(taken)]


def _digest(record: Record) -> str:
  said: Context
  if isinstance(record, Prompt):
    said = record.text
  elif record.prompt:
    said = record.prompt
  elif isinstance(record, Comparison):
    said = record.chosen
  elif isinstance(record, Ranking):
    said = record.responses[0]
  else:
    said = record.response
  return hashlib.sha256(text_of(said).encode()).hexdigest()


def _read(config: DataConfig, rejects: Rejects) -> tuple[Sequence[Record], Sequence[Record] | None]:
  if config.source == 'jsonl':
    assert config.path is not None
    ids: dict[str | int, str] = {}
    kept = jsonl.read(config.path, rejects, ids)
    if config.held_out_path is None:
      return kept, None
    return kept, jsonl.read(config.held_out_path, rejects, ids)
  name = config.source.removeprefix('tfds:')
  rows = tfds.read(name, config.tfds.split, config.path, config.tfds, rejects)
  if config.tfds.held_out_split is None:
    return rows, None
  return rows, tfds.read(name, config.tfds.held_out_split, config.path, config.tfds, rejects)


def _split(records: Sequence[Record]) -> Split:
  kinds: dict[str, list[Record]] = {}
  for record in records:
    kinds.setdefault(_KIND_OF[type(record)], []).append(record)
  return Split(**{kind: tuple(found) for kind, found in kinds.items()})  # type: ignore[arg-type]


def _complete(split: Split, responses: str) -> Split:
  """Adds the demonstrations that comparisons give, and prompts where the source has none."""
  demonstrations = [] if responses == 'preferred' else list(split.demonstrations)
  if responses == 'all' or not demonstrations:
    for pair in split.comparisons:
      demonstrations.append(Demonstration(pair.prompt, pair.chosen))
      if responses == 'all':
        demonstrations.append(Demonstration(pair.prompt, pair.rejected))
  prompts = split.prompts
  if not prompts:
    records: Iterable[Any] = itertools.chain(
      demonstrations, split.comparisons, split.ratings, split.rankings, split.step_ratings
    )
    prompts = tuple(map(Prompt, dict.fromkeys(record.prompt for record in records)))
  return dataclasses.replace(split, prompts=prompts, demonstrations=tuple(demonstrations))
