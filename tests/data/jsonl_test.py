"""Files of JSON lines are read whole, and what is wrong with them is said exactly."""

import gzip
import itertools
import json
import pathlib
import re
from typing import Any

import pytest

from rlhf_jax.common.errors import DataError
from rlhf_jax.data import jsonl
from rlhf_jax.data.rejects import Rejects
from rlhf_jax.feedback.dialogues import Message
from rlhf_jax.feedback.records import (
  Comparison,
  Demonstration,
  Prompt,
  Ranking,
  Rating,
  StepRating,
)

PAIR = {'prompt': 'How?', 'chosen': 'So.', 'rejected': 'Thus.'}
TEXT = {'prompt': 'How?', 'response': 'So.'}
TRL_TEXT = {'prompt': 'How?', 'completion': 'So.'}
RANKING = {'prompt': 'How?', 'responses': ['a', 'b', 'c']}
STEPS = {'prompt': 'How?', 'steps': ['So.', 'Thus.'], 'scores': [1, 0.5]}
TRL_STEPS = {'prompt': 'How?', 'completions': ['So.', 'Thus.'], 'labels': [True, False]}
ASKED, ANSWERED = ({'role': 'user', 'content': 'How?'}, {'role': 'assistant', 'content': 'So.'})
# A line of every form, in the order of jsonl.FORMS, and what it says.
LINES: list[tuple[dict[str, Any], jsonl.Record]] = [
  (PAIR, Comparison('How?', 'So.', 'Thus.')),
  (
    {'chosen': 'a\n\nAssistant: b', 'rejected': 'a\n\nAssistant: c'},
    Comparison('a\n\nAssistant:', ' b', ' c'),
  ),
  ({**TEXT, 'score': -2, 'annotator': 'ann'}, Rating('How?', 'So.', -2, 'ann')),
  ({**TEXT, 'desirable': True}, Rating('How?', 'So.', 1.0)),
  ({**TEXT, 'label': False}, Rating('How?', 'So.', -1.0)),
  ({**TRL_TEXT, 'score': 0.5}, Rating('How?', 'So.', 0.5)),
  ({**TRL_TEXT, 'desirable': False}, Rating('How?', 'So.', -1.0)),
  ({**TRL_TEXT, 'label': True}, Rating('How?', 'So.', 1.0)),
  ({**RANKING, 'ranks': [2, 1, 2]}, Ranking('How?', ('a', 'b', 'c'), (2, 1, 2))),
  ({**RANKING, 'best': 1}, Ranking('How?', ('a', 'b', 'c'), (2, 1, 2))),
  (STEPS, StepRating('How?', ('So.', 'Thus.'), (1, 0.5))),
  (TRL_STEPS, StepRating('How?', ('So.', 'Thus.'), (1, -1), separator='\n')),
  (TEXT, Demonstration('How?', 'So.')),
  (TRL_TEXT, Demonstration('How?', 'So.')),
  ({'messages': [ASKED, ANSWERED]}, Demonstration((Message('user', 'How?'),), 'So.')),
  (
    {'prompt': 'How?', 'messages': [ASKED, ANSWERED]},
    Demonstration((Message('user', 'How?'),), 'So.'),
  ),
  ({'prompt': 'How?'}, Prompt('How?')),
]
EXAMPLES = list(zip(jsonl.FORMS, LINES, strict=True))
FORM_NAMES = ['-'.join(form) for form in jsonl.FORMS]


def _write(path: pathlib.Path, *lines: object) -> str:
  rows = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
  path.write_bytes(b''.join(row + b'\n' for row in rows))
  return str(path)


def _read(path: str) -> list[jsonl.Record]:
  rejects = Rejects()
  records = jsonl.read(path, rejects)
  rejects.settle('strict', None)
  return records


@pytest.mark.parametrize(
  'line, record',
  [
    (PAIR, Comparison('How?', 'So.', 'Thus.')),
    (
      {**PAIR, 'preference': 0.5, 'margin': 2, 'annotator': 'ann', 'line': 4},
      Comparison('How?', 'So.', 'Thus.', 0.5, 2, 'ann'),
    ),
    ({'prompt': 'How?', 'response': 'Só ☺'}, Demonstration('How?', 'Só ☺')),
    ({'prompt': 'How?', 'source': 'web'}, Prompt('How?')),
    (
      {
        'chosen': '\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: So it is.',
        'rejected': '\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: So? No.',
      },
      Comparison(
        '\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:', ' So it is.', ' So? No.'
      ),
    ),
    (
      {
        'chosen': '\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d',
        'rejected': '\n\nHuman: a\n\nAssistant: x',
      },
      Comparison('\n\nHuman: a\n\nAssistant:', ' b\n\nHuman: c\n\nAssistant: d', ' x'),
    ),
    (
      {'chosen': '\n\nHuman: a\n\nAssistant: b', 'rejected': '\n\nHuman: a\n\nAssistant: b and c'},
      Comparison('\n\nHuman: a\n\nAssistant:', ' b', ' b and c'),
    ),
  ],
)
@pytest.mark.parametrize('name', ['data.jsonl', 'data.jsonl.gz'])
def test_each_form_is_read_from_plain_and_compressed_files(tmp_path, line, record, name):
  path = pathlib.Path(_write(tmp_path / name, line, b'', line))
  if name.endswith('.gz'):
    path.write_bytes(gzip.compress(path.read_bytes()))
  assert _read(str(path)) == [record, record]


@pytest.mark.parametrize('form, example', EXAMPLES, ids=FORM_NAMES)
def test_the_kind_of_a_line_follows_from_its_fields(tmp_path, form, example):
  line, record = example
  assert set(form) <= set(line)
  # Fields that are nobody's are left alone.
  assert _read(_write(tmp_path / 'data.jsonl', {**line, 'line': 3, 'tag': None})) == [record]


@pytest.mark.parametrize(
  'line, record',
  [
    (
      {**RANKING, 'best': 0, 'annotator': 'ann'},
      Ranking('How?', ('a', 'b', 'c'), (1, 2, 2), 'ann'),
    ),
    (
      {**STEPS, 'separator': '\n', 'annotator': 'ann'},
      StepRating('How?', ('So.', 'Thus.'), (1, 0.5), 'ann', '\n'),
    ),
    (
      {**TRL_STEPS, 'separator': ''},
      StepRating('How?', ('So.', 'Thus.'), (1, -1), separator=''),
    ),
    # The first verdict counts; texts beside responses or pairs are fields like any other.
    ({**TEXT, 'score': 3, 'label': 'helpful'}, Rating('How?', 'So.', 3)),
    ({**TEXT, 'steps': ['x'], 'completion': 'y'}, Demonstration('How?', 'So.')),
    ({**PAIR, 'score': 3, 'responses': ['x']}, Comparison('How?', 'So.', 'Thus.')),
  ],
)
def test_further_fields_of_a_record_are_read(tmp_path, line, record):
  assert _read(_write(tmp_path / 'data.jsonl', line)) == [record]


def test_the_page_on_data_shows_a_line_of_every_form(tmp_path):
  page = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'data.md'
  (block,) = re.findall(r'```json\n(.*?)```', page.read_text('utf-8'), re.DOTALL)
  lines = [json.loads(line) for line in block.splitlines()]
  for form, (_, record), line in zip(jsonl.FORMS, LINES, lines, strict=True):
    assert set(form) <= set(line)
    (found,) = _read(_write(tmp_path / 'data.jsonl', line))
    assert type(found) is type(record)


JUNK: list[Any] = [
  *(None, True, -1, 0, 7, 1.5, float('nan'), float('inf'), 10**400),
  *('', ' ', 'x', '\ud800', [], [None], ['x'], [['x']], ['x', 'x'], [1, 2], [True], {}, {'x': 1}),
]


@pytest.mark.parametrize('form, example', EXAMPLES, ids=FORM_NAMES)
def test_a_mutated_line_is_a_record_or_an_error_that_names_the_field(tmp_path, form, example):
  """Every field in turn is left out, or replaced by what does not belong there."""
  good, _ = example
  for field, junk in itertools.product(good, ['missing', *JUNK]):
    line = {name: value for name, value in good.items() if name != field}
    if junk != 'missing':
      line[field] = junk
    path = _write(tmp_path / 'data.jsonl', good, line)
    try:
      records = _read(path)
    except DataError as error:
      text = str(error)
      assert text.startswith(f'{path}:2: '), text
      # A text may be wrong only beside another, which the error then names.
      assert any(f"field '{name}" in text for name in good), (line, text)
    else:
      assert len(records) == 2 and type(records[0]) is type(records[1])
      assert junk != 'missing' or field not in form, line
    if field in form and (junk in ('missing', None) or junk == {}):
      with pytest.raises(DataError, match=rf":2: field '{field}'"):
        _read(path)


@pytest.mark.parametrize(
  'first, line, message',
  [
    ({**TEXT, 'score': 1}, TEXT, "field 'score': missing; the line has"),
    (TEXT, {**TEXT, 'score': 1}, r"field 'score': not expected: the other lines have \['prompt'"),
    ({**TEXT, 'score': 1}, {**TEXT, 'label': True}, "field 'score': missing"),
    ({**TEXT, 'label': True}, {**TEXT, 'label': 'yes'}, "field 'label': expected true or false"),
    ({**TEXT, 'label': True}, {**TEXT, 'label': 1}, "field 'label': expected true or false, got 1"),
    (TRL_TEXT, {'prompt': 'p', 'completion': ''}, "field 'completion': empty response"),
    (
      {**RANKING, 'best': 1},
      {**RANKING, 'best': 3},
      "field 'best': expected an integer from 0 to 2",
    ),
    ({**RANKING, 'best': 1}, {**RANKING, 'best': True}, "field 'best': expected an integer"),
    ({**RANKING, 'best': 1}, {**RANKING, 'ranks': [1, 2, 2]}, "field 'best': missing"),
    (
      {**RANKING, 'best': 1},
      {'prompt': 'p', 'responses': ['a', ''], 'best': 0},
      r"field 'responses\[1\]': empty response",
    ),
    (
      {**RANKING, 'best': 1},
      {**RANKING, 'best': 1, 'response': 'x'},
      "field 'response': not expected",
    ),
    (TRL_STEPS, {**TRL_STEPS, 'labels': [True, 1]}, r"field 'labels\[1\]': expected true or false"),
    (TRL_STEPS, {**TRL_STEPS, 'labels': [True]}, "field 'labels': 1 of them for 2 steps"),
    (
      TRL_STEPS,
      {**TRL_STEPS, 'completions': ['a', 2]},
      r"field 'completions\[1\]': expected text, got int",
    ),
    ({'prompt': 'p'}, {'prompt': None}, "field 'prompt': expected text, got NoneType"),
  ],
)
def test_a_bad_line_of_the_newer_forms_is_named(tmp_path, first, line, message):
  with pytest.raises(DataError, match=f'data.jsonl:2: {message}'):
    _read(_write(tmp_path / 'data.jsonl', first, line))


@pytest.mark.parametrize(
  'line, message',
  [
    (b'{"prompt": ', r'not JSON \(Expecting value at column 12\)'),
    (b'\xff\xfe', 'not UTF-8 at byte 1 of the line'),
    (b'[1]', 'expected a JSON object, got list'),
    (b'[' * 100_000, 'nested too deeply'),
    (b'{"prompt": 1' + b'0' * 5000 + b'}', 'a number of thousands of digits'),
    ({'prompt': 'How?', 'chosen': 'So.'}, "field 'rejected': missing; the line has"),
    ({**PAIR, 'response': 'x'}, "field 'response': not expected: the other lines have"),
    ({**PAIR, 'chosen': '  '}, "field 'chosen': empty response"),
    ({**PAIR, 'chosen': None}, "field 'chosen': expected text, got NoneType"),
    ({**PAIR, 'rejected': 'So.'}, "field 'rejected': the same text as chosen"),
    (b'{"prompt": "p", "chosen": "\\ud800", "rejected": "x"}', "field 'chosen': half a surrogate"),
    (b'{"prompt": "p", "chosen": "a", "rejected": "b", "margin": NaN}', "field 'margin'"),
  ],
)
def test_a_bad_line_is_named_with_field_and_reason(tmp_path, line, message):
  path = _write(tmp_path / 'data.jsonl', PAIR, b'', line, PAIR)
  with pytest.raises(DataError, match=f'data.jsonl:3: .*{message}') as caught:
    _read(path)
  assert "--config.data.on_error='quarantine'" in str(caught.value)


def test_the_first_bad_line_is_shown_and_the_others_are_counted(tmp_path):
  bad = {**PAIR, 'chosen': ''}
  path = _write(tmp_path / 'data.jsonl', PAIR, *[bad] * 9)
  with pytest.raises(DataError, match=r'data.jsonl:2: .* 8 more are bad: 3, 4, 5, 6, 7, \.\.\.'):
    _read(path)


@pytest.mark.parametrize(
  'line, message',
  [
    ({'chosen': 'So.'}, 'expected the fields of one of'),
    ({'text': 'So.'}, r"got \['text'\]"),
    ({**PAIR, 'response': 'x'}, 'expected the fields of one of'),
    (RANKING, 'prompt, responses, ranks; prompt, responses, best'),
    ({'prompt': 'How?', 'steps': ['a']}, 'expected the fields of one of'),
    ({**STEPS, **TRL_STEPS}, 'expected the fields of one of'),
    ({'response': 'So.', 'score': 1}, 'expected the fields of one of'),
    ({'chosen': 'Human: a', 'rejected': 'Human: b'}, r"no '\\n\\nAssistant:' in the start"),
    ({'chosen': 'Human: a', 'rejected': 'Human: a'}, 'the same text as chosen'),
    ({'chosen': [1], 'rejected': 'a'}, "field 'chosen': expected text, got list"),
    ({'chosen': [1], 'rejected': [2]}, r"field 'chosen\[0\]': expected {"),
    (
      {'chosen': '\n\nAssistant: ', 'rejected': '\n\nAssistant: b'},
      "field 'chosen': empty response",
    ),
  ],
)
def test_a_first_line_of_no_known_form_is_an_error(tmp_path, line, message):
  with pytest.raises(DataError, match=f'data.jsonl:1: .*{message}'):
    _read(_write(tmp_path / 'data.jsonl', line))


def test_missing_empty_and_unreadable_files_are_errors(tmp_path):
  with pytest.raises(DataError, match=r'nowhere.jsonl: no such file. Check --config.data.path'):
    _read(str(tmp_path / 'nowhere.jsonl'))
  for content in (b'', b'\n \n'):
    (tmp_path / 'empty.jsonl').write_bytes(content)
    with pytest.raises(DataError, match='empty.jsonl: the file is empty'):
      _read(str(tmp_path / 'empty.jsonl'))
  with pytest.raises(DataError, match='cannot be read'):
    _read(str(tmp_path))
  whole = gzip.compress(json.dumps(PAIR).encode() * 100)
  for content in (b'{"prompt": "How?"}\n', whole[:-20], whole[:12] + b'\xff' * 20):
    (tmp_path / 'cut.jsonl.gz').write_bytes(content)
    with pytest.raises(DataError, match='cut.jsonl.gz:1: not a whole gzip file'):
      _read(str(tmp_path / 'cut.jsonl.gz'))


def _set_aside(path: str) -> tuple[list[jsonl.Record], list[tuple[int, str]]]:
  """The records, and number and reason of each bad line."""
  rejects = Rejects()
  records = jsonl.read(path, rejects)
  side = pathlib.Path(path).with_name('side.jsonl')
  rejects.settle('quarantine', side)
  rows = [json.loads(row) for row in side.read_text().splitlines()] if side.exists() else []
  return records, [(row['number'], row['reason']) for row in rows]


@pytest.mark.parametrize(
  'line, reason',
  [
    (b'{"prompt": "a", "prompt": "b", "response": "c"}', 'given more than once'),
    (
      b'{"prompt": "a", "response": "c", "meta": [{"x": 1, "y": 2, "x": 1}]}',
      'given more than once',
    ),
    (json.dumps(TEXT).encode('utf-16')[2:], 'zero at byte 2 of the line, as a crash leaves them'),
    (bytes(500), 'zero at byte 1'),
    ('{"prompt": "H\u00f6?", "response": "c"}'.encode('latin-1'), 'not UTF-8 at byte 14'),
    (b'{"prompt": "a\x01", "response": "c"}', 'not JSON (Invalid control character'),
    (b'{"prompt": "a", "response": ' + b'[' * 200 + b']' * 200 + b'}', 'expected a message'),
    (b'{"prompt": "a", "response": ' + b'[' * 900 + b']' * 900 + b'}', ''),
    (b'{"prompt": "a", "response": ' + b'{"b":' * 5000 + b'1' + b'}' * 5001, 'nested too deeply'),
  ],
)
def test_a_bad_line_costs_no_other(tmp_path, line, reason):
  path = _write(tmp_path / 'data.jsonl', TEXT, line, {**TEXT, 'response': 'Thus.'})
  records, ((number, said),) = _set_aside(path)
  assert records == [Demonstration('How?', 'So.'), Demonstration('How?', 'Thus.')]
  assert number == 2 and (reason in said or 'expected a list' in said or 'expected {' in said)


def test_what_windows_and_long_texts_bring_is_read(tmp_path):
  """A byte order mark, CRLF, a text of a megabyte, and NaN in a field that nobody reads."""
  rows = [{'prompt': 'a', 'response': 'x' * 2**20}, {'prompt': 'b', 'response': 'c\r\n\0\u2028'}]
  content = '\r\n'.join([json.dumps(rows[0]), json.dumps({**rows[1], 'weight': float('nan')})])
  (tmp_path / 'data.jsonl').write_text(content, encoding='utf-8-sig', newline='')
  assert _read(str(tmp_path / 'data.jsonl')) == [Demonstration(**row) for row in rows]
  (tmp_path / 'data.jsonl').write_text(content, encoding='utf-16', newline='')
  with pytest.raises(DataError, match=r'data.jsonl:1: the file is UTF-16. Save it as UTF-8'):
    _read(str(tmp_path / 'data.jsonl'))


def test_a_last_line_without_an_end_is_read_if_it_is_whole(tmp_path):
  path, line = tmp_path / 'data.jsonl', json.dumps(TEXT).encode()
  path.write_bytes(line + b'\n' + line)
  assert len(_read(str(path))) == 2
  for end in range(1, len(line)):
    path.write_bytes(line + b'\n' + line[:end])
    records, ((number, reason),) = _set_aside(str(path))
    assert (len(records), number) == (1, 2)
    assert 'the file ends in this line, as if it was not written to its end' in reason
  with pytest.raises(DataError, match='data.jsonl:2: not JSON .*; the file ends in this line'):
    _read(str(path))


def test_a_damaged_gzip_file_is_an_error_or_keeps_what_is_before_the_damage(tmp_path):
  path = tmp_path / 'data.jsonl.gz'
  rows = [{**TEXT, 'response': f'{n * n}'} for n in range(500)]
  whole = gzip.compress(b''.join(json.dumps(row).encode() + b'\n' for row in rows))
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(
    DataError, match=r'gz:(\d+): not a whole gzip file \(it ends .*: what follows line \d+ is lost'
  ):
    _read(str(path))
  records, ((number, reason),) = _set_aside(str(path))
  assert (
    200 < len(records) < 500 and records == [Demonstration(**row) for row in rows][: number - 1]
  )
  assert f'what follows line {number - 1} is lost. Fetch it again' in reason


def test_damage_is_said_before_bad_lines(tmp_path):
  path = tmp_path / 'data.jsonl.gz'
  bad = b'{}\n' + json.dumps(TEXT).encode()
  path.write_bytes(gzip.compress(bad)[:-3])
  with pytest.raises(DataError, match=r'gz:3: not a whole gzip file .* 1 more are bad: 1\.'):
    _read(str(path))


def test_an_id_is_of_one_line(tmp_path):
  rows = [{**TEXT, 'id': name} for name in ('a', 1, '1', None, None, True, [1], 'a')]
  path = _write(tmp_path / 'data.jsonl', *rows)
  with pytest.raises(
    DataError, match=r"data.jsonl:8: field 'id': 'a' is that of .*data.jsonl:1 too: a line was rep"
  ):
    _read(path)
  records, ((number, _),) = _set_aside(path)
  assert (len(records), number) == (7, 8)
  # A bad line's id is free, and files that belong together share theirs.
  path = _write(tmp_path / 'data.jsonl', {**rows[0], 'response': ''}, rows[0])
  records, ((number, _),) = _set_aside(path)
  assert (len(records), number) == (1, 1)
  rejects = Rejects()
  ids: dict[str | int, str] = {}
  jsonl.read(path, rejects, ids)
  assert len(jsonl.read(path, rejects, ids)) == 0 and len(rejects) == 1 + 2


def test_what_most_lines_are_settles_what_all_must_be(tmp_path):
  """A first line that lacks a field is a bad line; it does not make bad ones of all others."""
  rating = {**TEXT, 'score': 1}
  path = _write(tmp_path / 'data.jsonl', TEXT, b'', rating, {**rating, 'score': 'x'}, rating)
  records, bad = _set_aside(path)
  assert records == [Rating('How?', 'So.', 1)] * 2
  assert bad == [
    (1, "missing; the line has ['prompt', 'response']"),
    (4, "expected a finite number, got 'x'"),
  ]


def test_hh_transcripts_are_read_but_for_the_four_empty_responses(shared_data):
  path = shared_data / 'hh_rlhf_test' / 'harmless_base_test.jsonl.gz'
  rejects = Rejects()
  records = jsonl.read(str(path), rejects)
  assert (len(records), len(rejects)) == (2308, 4)
  with gzip.open(path, 'rt', encoding='utf-8') as file:
    first = json.loads(file.readline())
  pair = records[0]
  assert isinstance(pair, Comparison) and isinstance(pair.prompt, str)
  assert pair.prompt + pair.chosen == first['chosen']
  assert pair.prompt + pair.rejected == first['rejected']
  assert pair.prompt.endswith('\n\nAssistant:')
