"""The records that feedback consists of; each checks itself where it is made."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

from rlhf_jax.common.errors import DataError


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
    """Reads the record's fields; raises RecordError for a field that is missing or wrong."""
    known = dataclasses.fields(cls)  # type: ignore[arg-type]
    for field in known:
      if field.default is dataclasses.MISSING and field.name not in fields:
        raise RecordError(field.name, f'missing; the record has {sorted(fields)}')
    return cls(**{field.name: fields[field.name] for field in known if field.name in fields})

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
  if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
    raise RecordError(field, f'expected a finite number, got {value!r:.60}')
