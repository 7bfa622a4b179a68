"""Files of JSON lines are read whole, and what is wrong with them is said exactly."""

import gzip
import json
import pathlib

import pytest

from rlhf_jax.common.errors import DataError
from rlhf_jax.data import jsonl
from rlhf_jax.data.rejects import Rejects
from rlhf_jax.feedback.records import Comparison, Demonstration, Prompt

PAIR = {'prompt': 'How?', 'chosen': 'So.', 'rejected': 'Thus.'}


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


@pytest.mark.parametrize(
  'line, message',
  [
    (b'{"prompt": ', r'not JSON \(Expecting value at column 12\)'),
    (b'\xff\xfe', 'not UTF-8 at byte 1 of the line'),
    (b'[1]', 'expected a JSON object, got list'),
    (b'[' * 100_000, 'nested too deeply'),
    ({'prompt': 'How?', 'chosen': 'So.'}, "field 'rejected': missing; the line has"),
    ({**PAIR, 'response': 'x'}, "field 'response': not expected: the lines before have"),
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
    ({'chosen': 'Human: a', 'rejected': 'Human: b'}, r"no '\\n\\nAssistant:' in the start"),
    ({'chosen': 'Human: a', 'rejected': 'Human: a'}, 'the same text as chosen'),
    ({'chosen': [1], 'rejected': [2]}, "field 'chosen': expected text, got list"),
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
    with pytest.raises(DataError, match='cut.jsonl.gz: not a whole gzip file'):
      _read(str(tmp_path / 'cut.jsonl.gz'))


def test_hh_transcripts_are_read_but_for_the_four_empty_responses(shared_data):
  path = shared_data / 'hh_rlhf_test' / 'harmless_base_test.jsonl.gz'
  rejects = Rejects()
  records = jsonl.read(str(path), rejects)
  assert (len(records), len(rejects)) == (2308, 4)
  with gzip.open(path, 'rt', encoding='utf-8') as file:
    first = json.loads(file.readline())
  pair = records[0]
  assert isinstance(pair, Comparison)
  assert pair.prompt + pair.chosen == first['chosen']
  assert pair.prompt + pair.rejected == first['rejected']
  assert pair.prompt.endswith('\n\nAssistant:')
