"""Files of JSON lines, of any one kind of records; docs/data.md shows a line of each."""

import gzip
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from rlhf_jax.common.errors import DataError
from rlhf_jax.data import dialogue_forms
from rlhf_jax.data.rejects import Rejects
from rlhf_jax.feedback.records import (
  Comparison,
  Demonstration,
  Prompt,
  Ranking,
  Rating,
  Record,
  RecordError,
  StepRating,
)

# The fields that settle the kind of a line: texts, and what was said of them.
TEXTS = ('prompt', 'response', 'chosen', 'rejected')
# Texts only beside a prompt that stands alone; else they are fields like any other.
BESIDE_PROMPT = ('completion', 'responses', 'steps', 'completions')
# A whole dialogue; only where the line has no other text than, perhaps, a prompt.
MESSAGES = dialogue_forms.MESSAGES
# Of these the first that the line has counts.
VERDICTS = {
  'response': ('score', 'desirable', 'label'),
  'completion': ('score', 'desirable', 'label'),
  'responses': ('ranks', 'best'),
  'steps': ('scores',),
  'completions': ('labels',),
}
# Between the completions that TRL's process reward models are trained on (its `step_separator`).
TRL_SEPARATOR = '\n'
# Where the last turn of a transcript begins (Bai et al. 2022, the released HH files).
TURN = '\n\nAssistant:'


def read(path: str, rejects: Rejects) -> list[Record]:
  """Reads a file of one kind of records; lines that cannot be read go to `rejects`.

  The first good line settles which of FORMS all lines have. Of a form's fields all are needed;
  `chosen, rejected` are whole transcripts whose common start, up to the last "\\n\\nAssistant:" in
  it, is the prompt. Texts may be lists of messages (`data.dialogue_forms`). Further fields of the
  record may be there; others are left alone, and so are blank lines.

  Raises:
    DataError: the file is missing, empty, or not readable at all.
  """
  records: list[Record] = []
  form: tuple[str, ...] | None = None
  count = 0
  for number, line in _lines(path):
    count += 1
    try:
      fields = _parse(line)
      form = _form(fields, form)
      records.append(FORMS[form](fields))
    except RecordError as error:
      rejects.add(path, number, error, line.decode('utf-8', 'backslashreplace').rstrip('\r\n'))
  if not count:
    raise DataError(f'{path}: the file is empty. Give a file with one JSON object a line.')
  return records


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
  try:
    compressed = pathlib.Path(path).suffix == '.gz'
    with gzip.open(path, 'rb') if compressed else open(path, 'rb') as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          yield number, line
  except FileNotFoundError:
    raise DataError(f'{path}: no such file. Check --config.data.path.') from None
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise DataError(f'{path}: not a whole gzip file ({error}). Fetch it again.') from error
  except OSError as error:
    raise DataError(f'{path}: cannot be read ({error.strerror}). Check the path.') from error


def _parse(line: bytes) -> dict[str, Any]:
  try:
    fields = json.loads(line.rstrip(b'\r\n').decode('utf-8'))
  except UnicodeDecodeError as error:
    raise RecordError('', f'not UTF-8 at byte {error.start + 1} of the line') from None
  except json.JSONDecodeError as error:
    raise RecordError('', f'not JSON ({error.msg} at column {error.colno})') from None
  except ValueError:  # Python refuses such integers
    raise RecordError('', 'not JSON that can be read (a number of thousands of digits)') from None
  except RecursionError:
    raise RecordError('', 'not JSON that can be read (nested too deeply)') from None
  if not isinstance(fields, dict):
    raise RecordError('', f'expected a JSON object, got {type(fields).__name__}')
  return fields


def _form(fields: dict[str, Any], form: tuple[str, ...] | None) -> tuple[str, ...]:
  """Which of the fields that settle its kind the line has, held against the lines before it."""
  found = tuple(name for name in TEXTS if name in fields)
  if found == ('prompt',):
    found += tuple(name for name in BESIDE_PROMPT if name in fields)
  if found in ((), ('prompt',)) and MESSAGES in fields:
    found += (MESSAGES,)
  verdicts = VERDICTS.get(found[-1], ()) if len(found) == 2 else ()
  found += tuple(name for name in verdicts if name in fields)[:1]
  if form is None:
    if found not in FORMS:
      forms = '; '.join(', '.join(names) for names in FORMS)
      raise RecordError('', f'expected the fields of one of ({forms}), got {sorted(fields)}')
    return found
  for name in form:
    if name not in fields:
      raise RecordError(name, f'missing; the line has {sorted(fields)}')
  for name in found:
    if name not in form:
      raise RecordError(name, f'not expected: the lines before have {list(form)}')
  return form


def _renamed(kind: type[Record], fields: dict[str, Any], **names: str) -> Record:
  """The record whose fields have other names in the line; errors name the line's."""
  try:
    return kind.from_dict({**fields, **{ours: fields[theirs] for ours, theirs in names.items()}})
  except RecordError as error:
    name, bracket, item = error.field.partition('[')
    raise RecordError(names.get(name, name) + bracket + item, error.reason) from None


def _comparison(fields: dict[str, Any]) -> Record:
  return Comparison.from_dict(dialogue_forms.comparison(fields))


def _demonstration(field: str) -> Callable[[dict[str, Any]], Record]:
  """Reads what a `response` or `completion` says, maybe over several turns."""

  def read(fields: dict[str, Any]) -> Record:
    fields = {**fields, field: dialogue_forms.turns(field, fields[field])}
    return _renamed(Demonstration, fields, response=field)

  return read


def _dialogue(fields: dict[str, Any]) -> Record:
  return Demonstration.from_dict(dialogue_forms.whole(fields))


def _rating(field: str) -> Callable[[dict[str, Any]], Record]:
  def read(fields: dict[str, Any]) -> Record:
    return _renamed(Rating, dialogue_forms.plain(fields, field), response=field)

  return read


def _ranking(fields: dict[str, Any]) -> Record:
  return Ranking.from_dict(dialogue_forms.all_plain(fields, 'responses'))


def _desirable(field: str) -> Callable[[dict[str, Any]], Record]:
  """Reads a true-or-false verdict on a `response` or `completion`."""

  def read(fields: dict[str, Any]) -> Record:
    text = 'response' if 'response' in fields else 'completion'
    fields = {**dialogue_forms.plain(fields, text), field: _sign(field, fields[field])}
    return _renamed(Rating, fields, response=text, score=field)

  return read


def _best(fields: dict[str, Any]) -> Record:
  fields = dialogue_forms.all_plain(fields, 'responses')
  best, responses = fields['best'], fields['responses']
  count = len(responses) if isinstance(responses, list) else 0
  # A list that is too short, or none, is for the record to refuse.
  if count and (isinstance(best, bool) or not isinstance(best, int) or not 0 <= best < count):
    raise RecordError('best', f'expected an integer from 0 to {count - 1}, got {best!r:.60}')
  ranks = [1 + (number != best) for number in range(count)]
  return Ranking.from_dict({**fields, 'ranks': ranks})


def _labelled_steps(fields: dict[str, Any]) -> Record:
  labels = fields['labels']
  if isinstance(labels, list):
    labels = [_sign(f'labels[{number}]', label) for number, label in enumerate(labels)]
  fields = {'separator': TRL_SEPARATOR, **fields, 'labels': labels}
  return _renamed(StepRating, fields, steps='completions', scores='labels')


def _sign(field: str, value: object) -> float:
  if not isinstance(value, bool):
    raise RecordError(field, f'expected true or false, got {value!r:.60}')
  return 1.0 if value else -1.0


def _transcripts(fields: dict[str, Any]) -> Record:
  if isinstance(fields['chosen'], list) and isinstance(fields['rejected'], list):
    return _comparison(fields)
  for name in ('chosen', 'rejected'):
    if not isinstance(fields[name], str):
      raise RecordError(name, f'expected text, got {type(fields[name]).__name__}')
  chosen, rejected = fields['chosen'], fields['rejected']
  if chosen == rejected:
    raise RecordError('rejected', 'the same text as chosen: the pair compares nothing')
  turn = os.path.commonprefix([chosen, rejected]).rfind(TURN)
  if turn < 0:
    raise RecordError('rejected', f'no {TURN!r} in the start it has in common with chosen')
  start = turn + len(TURN)
  texts = {'prompt': chosen[:start], 'chosen': chosen[start:], 'rejected': rejected[start:]}
  return Comparison.from_dict({**fields, **texts})


# The fields that a line must have -> how it is read.
FORMS: dict[tuple[str, ...], Callable[[dict[str, Any]], Record]] = {
  ('prompt', 'chosen', 'rejected'): _comparison,
  ('chosen', 'rejected'): _transcripts,
  ('prompt', 'response', 'score'): _rating('response'),
  ('prompt', 'response', 'desirable'): _desirable('desirable'),
  ('prompt', 'response', 'label'): _desirable('label'),
  ('prompt', 'completion', 'score'): _rating('completion'),
  ('prompt', 'completion', 'desirable'): _desirable('desirable'),
  ('prompt', 'completion', 'label'): _desirable('label'),
  ('prompt', 'responses', 'ranks'): _ranking,
  ('prompt', 'responses', 'best'): _best,
  ('prompt', 'steps', 'scores'): StepRating.from_dict,
  ('prompt', 'completions', 'labels'): _labelled_steps,
  ('prompt', 'response'): _demonstration('response'),
  ('prompt', 'completion'): _demonstration('completion'),
  (MESSAGES,): _dialogue,
  ('prompt', MESSAGES): _dialogue,
  ('prompt',): lambda fields: _renamed(Prompt, fields, text='prompt'),
}
