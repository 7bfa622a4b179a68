"""Files of JSON lines, of any one kind of records; docs/data.md shows a line of each."""

import codecs
import collections
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_jax.common.errors import DataError
from rlhf_jax.data import dialogue_forms, lines
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

Form = tuple[str, ...]
_TOO_DEEP = 'not JSON that can be read (nested too deeply)'


def read(path: str, rejects: Rejects, ids: dict[str | int, str] | None = None) -> list[Record]:
  """Reads a file of one kind of records; lines that cannot be read go to `rejects`.

  All lines have the same of FORMS, that of most of them. Of a form's fields all are needed;
  `chosen, rejected` are whole transcripts whose common start, up to the last "\\n\\nAssistant:" in
  it, is the prompt. Texts may be lists of messages (`data.dialogue_forms`). Further fields of the
  record may be there; others are left alone, and so are blank lines.

  Args:
    path: the file.
    rejects: where bad lines go, and what is said of a file that is damaged.
    ids: the place of each `id` of the lines read before, of this and other files; it is filled.

  Raises:
    DataError: the file is missing, empty, or not readable at all.
  """
  ids = {} if ids is None else ids
  found = _read(path, None, ids)
  most, count = found.forms.most_common(1)[0] if found.forms else (None, 0)
  if count > found.forms[found.form] and not found.rejects.damage:
    # The first lines were the odd ones: a bad line must not cost all the good ones behind it. In a
    # damaged file it is rather the first that are good.
    found = _read(path, most, ids)
  rejects.extend(found.rejects)
  ids |= found.ids
  return found.records


class _Found:
  """What there is in a file.

  Attributes:
    records: of the good lines.
    ids: of the good lines, and where they stand.
    rejects: the bad lines.
    form: what all good lines have.
    forms: how many lines have each of FORMS.
  """

  def __init__(self, path: str, form: Form | None, known: Mapping[str | int, str]):
    self.records: list[Record] = []
    self.ids: dict[str | int, str] = {}
    self.rejects = Rejects()
    self.form = form
    self.forms: collections.Counter[Form | None] = collections.Counter()
    self._path = path
    self._known = known

  def add(self, line: lines.Line) -> None:
    """Reads a line; raises RecordError for a bad one."""
    fields = _parse(line)
    found = _form(fields)
    if found in FORMS:
      self.forms[found] += 1
    if self.form is None:
      if found not in FORMS:
        forms = '; '.join(', '.join(names) for names in FORMS)
        raise RecordError('', f'expected the fields of one of ({forms}), got {_names(fields)}')
      self.form = found
    _check_form(fields, found, self.form)
    identity = _id(fields)
    if identity is not None:
      place = self.ids.get(identity) or self._known.get(identity)
      if place is not None:
        raise RecordError(
          'id',
          f'{identity!r:.60} is that of {place} too: a line was repeated, or two were given one '
          'id. A field that does not number lines needs another name',
        )
    self.records.append(FORMS[self.form](fields))
    if identity is not None:
      self.ids[identity] = f'{self._path}:{line.number}'


def _read(path: str, form: Form | None, ids: Mapping[str | int, str]) -> _Found:
  found = _Found(path, form, ids)
  number, half = 0, None
  try:
    for line in lines.read(path):
      number = line.number
      try:
        found.add(line)
      except (RecordError, RecursionError) as caught:
        error = caught if isinstance(caught, RecordError) else RecordError('', _TOO_DEEP)
        raw = line.content.decode('utf-8', 'backslashreplace')
        if not line.ended:
          half = error, raw
        else:
          found.rejects.add(path, number, error, raw)
  except lines.DamageError as damage:
    kept = number - (half is not None)
    error = RecordError('', f'{damage}: what follows line {kept} is lost. Fetch it again')
    found.rejects.add(path, kept + 1, error, half[1] if half else '', damage=True)
  else:
    if half is not None:
      found.rejects.add(path, number, *half)
    if not number:
      raise DataError(f'{path}: the file is empty. Give a file with one JSON object a line.')
  return found


def _parse(line: lines.Line) -> dict[str, Any]:
  content = line.content.removeprefix(codecs.BOM_UTF8) if line.number == 1 else line.content
  if not line.whole:
    raise RecordError('', f'longer than {lines.LONGEST} bytes')
  if line.number == 1 and content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
    raise RecordError('', 'the file is UTF-16. Save it as UTF-8')
  if (place := content.find(b'\0') + 1) > 0:
    raise RecordError(
      '', f'zero at byte {place} of the line, as a crash leaves them, or as in UTF-16'
    )
  half = '' if line.ended else '; the file ends in this line, as if it was not written to its end'
  try:
    fields = json.loads(content.decode('utf-8'), object_pairs_hook=_object)
  except UnicodeDecodeError as error:
    raise RecordError('', f'not UTF-8 at byte {error.start + 1} of the line{half}') from None
  except json.JSONDecodeError as error:
    raise RecordError('', f'not JSON ({error.msg} at column {error.colno}){half}') from None
  except ValueError:  # Python refuses such integers
    raise RecordError('', 'not JSON that can be read (a number of thousands of digits)') from None
  if not isinstance(fields, dict):
    raise RecordError('', f'expected a JSON object, got {type(fields).__name__}')
  return fields


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object; of a field that is given twice, Python would take the last in silence."""
  fields = dict(pairs)
  if len(fields) < len(pairs):
    names = collections.Counter(name for name, _ in pairs)
    twice = next(name for name, count in names.items() if count > 1)
    raise RecordError(f'{twice!a:.60}'.strip("'"), 'given more than once')
  return fields


def _names(fields: dict[str, Any]) -> str:
  return f'{sorted(fields)!s:.300}'


def _id(fields: dict[str, Any]) -> str | int | None:
  """What the line calls itself, if that is a text or an integer."""
  identity = fields.get('id')
  return identity if isinstance(identity, str | int) and not isinstance(identity, bool) else None


def _form(fields: dict[str, Any]) -> Form:
  """Which of the fields that settle its kind the line has."""
  found = tuple(name for name in TEXTS if name in fields)
  if found == ('prompt',):
    found += tuple(name for name in BESIDE_PROMPT if name in fields)
  if found in ((), ('prompt',)) and MESSAGES in fields:
    found += (MESSAGES,)
  verdicts = VERDICTS.get(found[-1], ()) if len(found) == 2 else ()
  return found + tuple(name for name in verdicts if name in fields)[:1]


def _check_form(fields: dict[str, Any], found: Form, form: Form) -> None:
  """Raises RecordError for a line of another form than the others have."""
  for name in form:
    if name not in fields:
      raise RecordError(name, f'missing; the line has {_names(fields)}')
  for name in found:
    if name not in form:
      raise RecordError(name, f'not expected: the other lines have {list(form)}')


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
FORMS: dict[Form, Callable[[dict[str, Any]], Record]] = {
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
