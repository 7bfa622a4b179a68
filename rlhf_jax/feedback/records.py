"""The records that feedback consists of; each checks itself where it is made."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Self

from rlhf_jax.feedback import dialogues
from rlhf_jax.feedback.checks import (
  RecordError,
  check_number,
  check_one_each,
  check_response,
  check_several,
  check_text,
)
from rlhf_jax.feedback.dialogues import Context, Reply


class _Record:
  """What the records share: fields are read from mappings by name, others are left alone."""

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> Self:
    """Reads the record's fields, lists as tuples; raises RecordError for one missing or wrong."""
    values = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
      if field.name in fields:
        values[field.name] = _from_json(field, fields[field.name])
      elif field.default is dataclasses.MISSING:
        raise RecordError(field.name, f'missing; the record has {sorted(fields)}')
    return cls(**values)

  def to_dict(self) -> dict[str, Any]:
    """All fields, by name."""
    return dataclasses.asdict(self)  # type: ignore[call-overload]


@dataclasses.dataclass(frozen=True)
class Prompt(_Record):
  """What a response answers; empty text asks for anything at all."""

  text: Context

  def __post_init__(self) -> None:
    dialogues.check_context('text', self.text)


@dataclasses.dataclass(frozen=True)
class Demonstration(_Record):
  """A response worth imitating.

  Attributes:
    prompt: what it answers.
    response: the response, or the rest of a dialogue, every turn of whose assistant is imitated.
  """

  prompt: Context
  response: Reply

  def __post_init__(self) -> None:
    dialogues.check_context('prompt', self.prompt)
    if not isinstance(self.response, tuple):
      check_response('response', self.response)
      return
    dialogues.check_turns('response', self.response)
    if isinstance(self.prompt, str):
      raise RecordError('prompt', 'expected messages, as the response is, got text')


@dataclasses.dataclass(frozen=True)
class Comparison(_Record):
  """Two responses to a prompt, of which one was preferred.

  Attributes:
    prompt: what both answer.
    chosen: the preferred response.
    rejected: the other.
    preference: probability that `chosen` is the better, in [0.5, 1]; 0.5 is a tie.
    margin: how much better it was said to be, in the source's units; 0 where nobody said.
    annotator: who said so; '' where unknown.
  """

  prompt: Context
  chosen: str
  rejected: str
  preference: float = 1.0
  margin: float = 0.0
  annotator: str = ''

  def __post_init__(self) -> None:
    dialogues.check_context('prompt', self.prompt)
    check_response('chosen', self.chosen)
    check_response('rejected', self.rejected)
    if self.chosen.strip() == self.rejected.strip():
      raise RecordError('rejected', 'the same text as chosen: the pair compares nothing')
    check_number('preference', self.preference)
    if not 0.5 <= self.preference <= 1:
      raise RecordError(
        'preference',
        f'{self.preference!r} is not in [0.5, 1]; below 0.5, swap chosen and rejected',
      )
    check_number('margin', self.margin)
    if self.margin < 0:
      raise RecordError('margin', f'{self.margin!r} is negative; swap chosen and rejected')
    check_text('annotator', self.annotator)


@dataclasses.dataclass(frozen=True)
class Rating(_Record):
  """A response that was scored by itself.

  Attributes:
    prompt: what it answers.
    response: the response.
    score: how good it was said to be, in the source's units, higher is better; of labels that say
      no more than desirable or undesirable, 1 and -1.
    annotator: who said so; '' where unknown.
  """

  prompt: Context
  response: str
  score: float
  annotator: str = ''

  def __post_init__(self) -> None:
    dialogues.check_context('prompt', self.prompt)
    check_response('response', self.response)
    check_number('score', self.score)
    check_text('annotator', self.annotator)


@dataclasses.dataclass(frozen=True)
class Ranking(_Record):
  """Several responses to a prompt, put in an order.

  Attributes:
    prompt: what all answer.
    responses: two or more, all different, in any order.
    ranks: of each response, 1 the best; equal ranks were not told apart, so that the choice of the
      best of four is (1, 2, 2, 2). They are not all equal.
    annotator: whose order it is; '' where unknown.
  """

  prompt: Context
  responses: tuple[str, ...]
  ranks: tuple[int, ...]
  annotator: str = ''

  def __post_init__(self) -> None:
    dialogues.check_context('prompt', self.prompt)
    check_several('responses', self.responses, 2)
    seen: dict[str, int] = {}
    for number, response in enumerate(self.responses):
      check_response(f'responses[{number}]', response)
      same = seen.setdefault(response.strip(), number)
      if same != number:
        raise RecordError(f'responses[{number}]', f'the same text as responses[{same}]')
    check_several('ranks', self.ranks, 1)
    check_one_each('ranks', self.ranks, 'responses', self.responses)
    for number, rank in enumerate(self.ranks):
      if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= len(self.ranks):
        raise RecordError(
          f'ranks[{number}]', f'expected an integer from 1 to {len(self.ranks)}, got {rank!r:.60}'
        )
    if min(self.ranks) != 1:
      raise RecordError('ranks', f'the smallest is {min(self.ranks)}; the best has rank 1')
    if max(self.ranks) == 1:
      raise RecordError('ranks', 'all equal: the ranking says nothing')
    check_text('annotator', self.annotator)


@dataclasses.dataclass(frozen=True)
class StepRating(_Record):
  """A response whose steps were scored one by one.

  Attributes:
    prompt: what it answers.
    steps: one or more; with the separator between them they are the response.
    scores: of each step, higher is better; of labels that say no more than right or wrong, 1 and
      -1.
    annotator: who said so; '' where unknown.
    separator: what stands between two steps and belongs to neither.
  """

  prompt: Context
  steps: tuple[str, ...]
  scores: tuple[float, ...]
  annotator: str = ''
  separator: str = ' '

  @property
  def response(self) -> str:
    """The whole response."""
    return self.separator.join(self.steps)

  def __post_init__(self) -> None:
    dialogues.check_context('prompt', self.prompt)
    check_several('steps', self.steps, 1)
    for number, step in enumerate(self.steps):
      check_response(f'steps[{number}]', step)
    check_several('scores', self.scores, 1)
    check_one_each('scores', self.scores, 'steps', self.steps)
    for number, score in enumerate(self.scores):
      check_number(f'scores[{number}]', score)
    check_text('annotator', self.annotator)
    check_text('separator', self.separator)


def _from_json(field: dataclasses.Field, value: Any) -> Any:
  """Lists as what the field holds; what does not fit stays, for the record to refuse."""
  if field.type == Context and dialogues.is_written(value):
    return dialogues.read(field.name, value)
  if isinstance(value, list) and typing.get_origin(field.type) is tuple:
    return tuple(value)
  return value


Record = Prompt | Demonstration | Comparison | Rating | Ranking | StepRating
