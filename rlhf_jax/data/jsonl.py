"""Files of JSON lines: comparisons, transcripts, demonstrations or prompts."""

import gzip
import json
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

from rlhf_jax.common.errors import DataError
from rlhf_jax.data.rejects import Rejects
from rlhf_jax.feedback.records import Comparison, Demonstration, Prompt, RecordError

Record = Prompt | Demonstration | Comparison

TEXT_FIELDS = ('prompt', 'response', 'chosen', 'rejected')
FORMS = (
  ('prompt', 'chosen', 'rejected'),
  ('chosen', 'rejected'),
  ('prompt', 'response'),
  ('prompt',),
)
# Where the last turn of a transcript begins (Bai et al. 2022, the released HH files).
TURN = '\n\nAssistant:'


def read(path: str, rejects: Rejects) -> list[Record]:
  """Reads a file of one kind of records; lines that cannot be read go to `rejects`.

  The first good line settles the kind: `prompt, chosen, rejected`; `chosen, rejected` as whole
  transcripts whose common start, up to the last "\\n\\nAssistant:" in it, is the prompt;
  `prompt, response`; or `prompt`. Comparisons may have `preference`, `margin` and `annotator`.
  Other fields are left alone, and so are blank lines.

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
      records.append(_record(fields, form))
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
  except RecursionError:
    raise RecordError('', 'not JSON that can be read (nested too deeply)') from None
  if not isinstance(fields, dict):
    raise RecordError('', f'expected a JSON object, got {type(fields).__name__}')
  return fields


def _form(fields: dict[str, Any], form: tuple[str, ...] | None) -> tuple[str, ...]:
  """Which text fields the line has, held against those of the lines before it."""
  found = tuple(name for name in TEXT_FIELDS if name in fields)
  if form is None:
    if found not in FORMS:
      forms = '; '.join(', '.join(names) for names in FORMS)
      raise RecordError('', f'expected the fields of one of ({forms}), got {sorted(fields)}')
    return found
  for name in form:
    if name not in found:
      raise RecordError(name, f'missing; the line has {sorted(fields)}')
  for name in found:
    if name not in form:
      raise RecordError(name, f'not expected: the lines before have {list(form)}')
  return form


def _record(fields: dict[str, Any], form: tuple[str, ...]) -> Record:
  if form == ('prompt',):
    return Prompt(fields['prompt'])
  if 'response' in form:
    return Demonstration.from_dict(fields)
  if 'prompt' in form:
    return Comparison.from_dict(fields)
  return Comparison.from_dict({**fields, **_split_transcripts(fields)})


def _split_transcripts(fields: dict[str, Any]) -> dict[str, str]:
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
  return {'prompt': chosen[:start], 'chosen': chosen[start:], 'rejected': rejected[start:]}
