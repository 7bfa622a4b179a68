"""The records that feedback consists of; each checks itself where it is made."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Self

from rlhf_jax.common.errors import DataError

# Of float32, in which batches hold numbers.
_LARGEST = 3.4e38


class RecordError(DataError):
  """A record that cannot be: which field is wrong, and why."""

  def __init__(self, field: str, reason: str):
    super().__init__(f'field {field!r}: {reason}')
    self.field = field
    self.reason = reason


class _Record:
  """What the records share: fields are read from mappings by name, others are left alone."""

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> Self:
    """Reads the record's fields, lists as tuples; raises RecordError for one missing or wrong."""
    values = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
      if field.name in fields:
        value = fields[field.name]
        several = isinstance(value, list) and typing.get_origin(field.type) is tuple
        values[field.name] = tuple(value) if several else value
      elif field.default is dataclasses.MISSING:
        raise RecordError(field.name, f'missing; the record has {sorted(fields)}')
    return cls(**values)

  def to_dict(self) -> dict[str, Any]:
    """All fields, by name."""
    return dataclasses.asdict(self)  # type: ignore[call-overload]


@dataclasses.dataclass(frozen=True)
class Prompt(_Record):
  """What a response answers; empty text asks for anything at all."""

  text: str

  def __post_init__(self) -> None:
    _check_text('text', self.text)


@dataclasses.dataclass(frozen=True)
class Demonstration(_Record):
  """A response worth imitating."""

  prompt: str
  response: str

  def __post_init__(self) -> None:
    _check_text('prompt', self.prompt)
    _check_response('response', self.response)


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

  prompt: str
  chosen: str
  rejected: str
  preference: float = 1.0
  margin: float = 0.0
  annotator: str = ''

  def __post_init__(self) -> None:
    _check_text('prompt', self.prompt)
    _check_response('chosen', self.chosen)
    _check_response('rejected', self.rejected)
    if self.chosen.strip() == self.rejected.strip():
      raise RecordError('rejected', 'the same text as chosen: the pair compares nothing')
    _check_number('preference', self.preference)
    if not 0.5 <= self.preference <= 1:
      raise RecordError(
        'preference',
        f'{self.preference!r} is not in [0.5, 1]; below 0.5, swap chosen and rejected',
      )
    _check_number('margin', self.margin)
    if self.margin < 0:
      raise RecordError('margin', f'{self.margin!r} is negative; swap chosen and rejected')
    _check_text('annotator', self.annotator)


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

  prompt: str
  response: str
  score: float
  annotator: str = ''

  def __post_init__(self) -> None:
    _check_text('prompt', self.prompt)
    _check_response('response', self.response)
    _check_number('score', self.score)
    _check_text('annotator', self.annotator)


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

  prompt: str
  responses: tuple[str, ...]
  ranks: tuple[int, ...]
  annotator: str = ''

  def __post_init__(self) -> None:
    _check_text('prompt', self.prompt)
    _check_several('responses', self.responses, 2)
    seen: dict[str, int] = {}
    for number, response in enumerate(self.responses):
      _check_response(f'responses[{number}]', response)
      same = seen.setdefault(response.strip(), number)
      if same != number:
        raise RecordError(f'responses[{number}]', f'the same text as responses[{same}]')
    _check_several('ranks', self.ranks, 1)
    _check_one_each('ranks', self.ranks, 'responses', self.responses)
    for number, rank in enumerate(self.ranks):
      if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= len(self.ranks):
        raise RecordError(
          f'ranks[{number}]', f'expected an integer from 1 to {len(self.ranks)}, got {rank!r:.60}'
        )
    if min(self.ranks) != 1:
      raise RecordError('ranks', f'the smallest is {min(self.ranks)}; the best has rank 1')
    if max(self.ranks) == 1:
      raise RecordError('ranks', 'all equal: the ranking says nothing')
    _check_text('annotator', self.annotator)


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

  prompt: str
  steps: tuple[str, ...]
  scores: tuple[float, ...]
  annotator: str = ''
  separator: str = ' '

  @property
  def response(self) -> str:
    """The whole response."""
    return self.separator.join(self.steps)

  def __post_init__(self) -> None:
    _check_text('prompt', self.prompt)
    _check_several('steps', self.steps, 1)
    for number, step in enumerate(self.steps):
      _check_response(f'steps[{number}]', step)
    _check_several('scores', self.scores, 1)
    _check_one_each('scores', self.scores, 'steps', self.steps)
    for number, score in enumerate(self.scores):
      _check_number(f'scores[{number}]', score)
    _check_text('annotator', self.annotator)
    _check_text('separator', self.separator)


Record = Prompt | Demonstration | Comparison | Rating | Ranking | StepRating


def _check_text(field: str, value: object) -> None:
  if not isinstance(value, str):
    raise RecordError(field, f'expected text, got {type(value).__name__} {value!r:.60}')
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise RecordError(field, f'half a surrogate pair at character {error.start}') from None


def _check_response(field: str, value: object) -> None:
  _check_text(field, value)
  if not str(value).strip():
    raise RecordError(field, 'empty response')


def _check_number(field: str, value: object) -> None:
  number = not isinstance(value, bool) and isinstance(value, int | float)
  if not (number and abs(value) <= _LARGEST):  # type: ignore[arg-type]
    raise RecordError(field, f'expected a finite number, got {value!r:.60}')


def _check_several(field: str, value: object, least: int) -> None:
  if not isinstance(value, tuple):
    raise RecordError(
      field, f'expected a list (a tuple in Python), got {type(value).__name__} {value!r:.60}'
    )
  if len(value) < least:
    raise RecordError(field, f'expected at least {least}, got {len(value)}')


def _check_one_each(field: str, values: tuple, other: str, others: tuple) -> None:
  if len(values) != len(others):
    raise RecordError(field, f'{len(values)} of them for {len(others)} {other}')
