"""What the fields of records must be; what is not is named by field and reason."""

from rlhf_jax.common.errors import DataError

# Of float32, in which batches hold numbers.
_LARGEST = 3.4e38


class RecordError(DataError):
  """A record that cannot be: which field is wrong, and why."""

  def __init__(self, field: str, reason: str):
    super().__init__(f'field {field!r}: {reason}')
    self.field = field
    self.reason = reason


def check_text(field: str, value: object) -> None:
  """Demands text that can be written as UTF-8."""
  if not isinstance(value, str):
    raise RecordError(field, f'expected text, got {type(value).__name__} {value!r:.60}')
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise RecordError(field, f'half a surrogate pair at character {error.start}') from None


def check_response(field: str, value: object) -> None:
  """Demands text that is not empty."""
  check_text(field, value)
  if not str(value).strip():
    raise RecordError(field, 'empty response')


def check_number(field: str, value: object) -> None:
  """Demands a finite number that a float32 can hold."""
  number = not isinstance(value, bool) and isinstance(value, int | float)
  if not (number and abs(value) <= _LARGEST):  # type: ignore[arg-type]
    raise RecordError(field, f'expected a finite number, got {value!r:.60}')


def check_several(field: str, value: object, least: int) -> None:
  """Demands a tuple of at least so many."""
  if not isinstance(value, tuple):
    raise RecordError(
      field, f'expected a list (a tuple in Python), got {type(value).__name__} {value!r:.60}'
    )
  if len(value) < least:
    raise RecordError(field, f'expected at least {least}, got {len(value)}')


def check_one_each(field: str, values: tuple, other: str, others: tuple) -> None:
  """Demands as many values as there are others."""
  if len(values) != len(others):
    raise RecordError(field, f'{len(values)} of them for {len(others)} {other}')
