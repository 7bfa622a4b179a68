"""Ten thousand spoilt lines: nothing is raised but our errors, and no good line is lost.

The same code draws the same each time. `RLHF_JAX_FUZZ=N make test TESTS=tests/data/fuzz_test.py`
draws others, N times as many; of what fails the lines are printed.
"""

import gzip
import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from rlhf_jax.common.errors import DataError
from rlhf_jax.data import jsonl, pipeline, sources, templates, tokenizers
from rlhf_jax.data.config import DataConfig
from rlhf_jax.data.rejects import Rejects
from rlhf_jax.feedback.records import Record

TIMES = int(os.environ.get('RLHF_JAX_FUZZ', '0'))
SPOILT = 20  # lines of an example
GOOD = 2 * SPOILT + 1  # so that they are always most of the file

TOKENIZER = tokenizers.train('byte', ['How so?', 'Thus.'], 300).with_template(templates.PLAIN)

# One line of every kind, with `n` in it, so that no two are the same.
KINDS: dict[str, Any] = {
  'prompt': lambda n: {'prompt': f'How {n}?'},
  'response': lambda n: {'prompt': 'How?', 'response': f'So {n}.', 'annotator': 'ann'},
  'messages': lambda n: {
    'messages': [
      {'role': 'system', 'content': 'Be brief.'},
      {'role': 'user', 'content': 'How?'},
      {'role': 'assistant', 'content': f'So {n}.'},
    ]
  },
  'pair': lambda n: {'prompt': 'Hów ☺?', 'chosen': f'So {n}.', 'rejected': 'Thus.', 'margin': 1.5},
  'hh': lambda n: {'chosen': f'a\n\nAssistant: {n}', 'rejected': 'a\n\nAssistant: x'},
  'rating': lambda n: {'prompt': 'How?', 'response': f'So {n}.', 'score': -1.5},
  'label': lambda n: {'prompt': 'How?', 'completion': f'So {n}.', 'label': True},
  'ranking': lambda n: {'prompt': 'How?', 'responses': ['a', 'b', f'{n}'], 'ranks': [1, 2, 2]},
  'best': lambda n: {'prompt': 'How?', 'responses': ['a', 'b', f'{n}'], 'best': 1},
  'steps': lambda n: {'prompt': 'How?', 'steps': ['So.', f'{n}'], 'scores': [1, 0.5]},
}

# What is put into lines: pieces of JSON that change what it means, and bytes that are no text.
PIECES = [
  *(b'"', b'\\', b'{', b'}', b'[', b']', b',', b':', b' ', b'\r', b'\r\n', b'\n', b'\0', b'\t'),
  *(b'null', b'true', b'NaN', b'-Infinity', b'1e999', b'-0', b'9' * 5000, b'0.' + b'1' * 400),
  *(b'\\ud800', b'\\udc00\\ud800', b'\\u0000', b'\xff', b'\xef\xbb\xbf', b'\xff\xfe', b'\xc0'),
  *(b'\xed\xa0\x80', b'\xe2\x80\xa8', '\u202e'.encode(), '\ufdd0'.encode(), '\uffff'.encode()),
  *(
    b'[' * 990,
    b'{"a":' * 990,
    b'[' * 100_000,
    b'"prompt": "p", ',
    b'"id": 1,',
    b'"messages": [],',
  ),
  *(b'"response": "x", ', b'"score": 1, ', b'"role": "tool", ', b'"tool_calls": [1],', b'\\n'),
]
VALUES = [
  *(None, True, 0, 2, -1.5, 1e39, 10**400, float('nan'), float('inf'), '', ' ', 'x', '\0', '\n'),
  *(
    '\ud800',
    'a\udfff',
    '\ufdd0',
    '\u2028',
    'user',
    [],
    {},
    ['a', 'a'],
    ['a', 'b', 'c'],
    [1, 2, 2],
  ),
  *([None], [['x']], [1, 1, 1], [True, 1.0, 2], {'role': 'user', 'content': 'x'}, 'x' * 2**14),
]


def value(draw: random.Random) -> Any:
  """A JSON value, of which some are messages or nearly."""
  message = {name: draw.choice(VALUES) for name in draw.sample(['role', 'content', 'x'], 2)}
  turns = [{'role': draw.choice(['user', 'assistant']), 'content': draw.choice(VALUES)}] * 2
  return draw.choice([draw.choice(VALUES), draw.choice(VALUES), message, [message], turns])


def spoilt(kind: str, draw: random.Random) -> bytes:
  """A line of a kind, changed in a value, or in its bytes at one to three places."""
  fields = KINDS[kind](draw.randrange(10))
  way = draw.choice(['value', 'value', 'bytes', 'bytes', 'cut', 'drop', 'noise'])
  name = draw.choice(sorted(fields))
  if way == 'value':
    inside = isinstance(fields[name], list) and draw.random() < 0.5
    if inside:
      fields[name] = [*fields[name]]
    if inside and isinstance(fields[name][-1], dict):
      fields[name][-1] = {**fields[name][-1], 'content': draw.choice(VALUES)}
    elif inside:
      fields[name][draw.randrange(len(fields[name]))] = draw.choice(VALUES)
    else:
      fields[name] = value(draw)
  elif way == 'drop':
    del fields[name]
  elif way == 'noise':
    return draw.choice([draw.randbytes(draw.randrange(60)), draw.choice(PIECES)])
  line = json.dumps(fields, ensure_ascii=draw.random() < 0.7).encode('utf-8', 'surrogatepass')
  if way == 'cut':
    return line[: draw.randrange(len(line))]
  for _ in range(draw.randint(1, 3) if way == 'bytes' else 0):
    start = draw.randrange(len(line) + 1)
    end = start + draw.choice([0, 0, 1, 8])
    piece = draw.choice([draw.choice(PIECES), draw.randbytes(draw.randint(1, 3))])
    line = line[:start] + piece + line[end:]
  return line


@st.composite
def files(draw: st.DrawFn) -> tuple[str, list[bytes], list[int]]:
  """A kind, the spoilt lines of a file, and how many good ones stand before each of them.

  One number makes the whole file: of what it draws bit by bit hypothesis repeats four fifths.
  """
  kind = draw(st.sampled_from(sorted(KINDS)))
  drawn = random.Random(draw(st.integers(0, 2**64 - 1)))
  places = sorted(drawn.randrange(GOOD + 1) for _ in range(SPOILT))
  return kind, [spoilt(kind, drawn) for _ in range(SPOILT)], places


def fuzz(examples: int) -> settings:
  """The same examples each time, unless others are asked for."""
  return settings(
    max_examples=examples * (TIMES or 1),
    derandomize=not TIMES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
  )


@pytest.fixture(scope='module')
def folder() -> Iterator[Path]:
  with tempfile.TemporaryDirectory() as name:
    yield Path(name)


def good(kind: str) -> tuple[list[bytes], list[Record]]:
  """Good lines, and what they say when nothing is between them."""
  rows = [KINDS[kind](100 + number) for number in range(GOOD)]
  form = jsonl._form(rows[0])
  return [json.dumps(row).encode() for row in rows], [jsonl.FORMS[form](row) for row in rows]


def mixed(kind: str, bad: list[bytes], places: list[int]) -> tuple[bytes, list[Record]]:
  """The file, and the records of its good lines."""
  rows, records = good(kind)
  pieces, last = list[bytes](), 0
  for place, line in zip(places, bad, strict=True):
    pieces += [*rows[last:place], line]
    last = place
  return b'\n'.join([*pieces, *rows[last:], b'']), records


def ours(found: list[Record], wanted: list[Record]) -> None:
  """All wanted records are there, in their order, among others."""
  rest = iter(found)
  assert all(any(record == other for other in rest) for record in wanted)


@pytest.mark.slow
@given(files())
@fuzz(510)
def test_ten_thousand_spoilt_lines(folder: Path, drawn: tuple[str, list[bytes], list[int]]) -> None:
  """Each line is a record or is set aside; strict reading refuses what quarantine sets aside."""
  content, wanted = mixed(*drawn)
  path, side = folder / 'rows.jsonl', folder / 'side.jsonl'
  path.write_bytes(content)
  rejects = Rejects()
  records = jsonl.read(str(path), rejects)
  ours(records, wanted)
  count = sum(bool(line.strip()) for line in content.split(b'\n'))
  assert len(records) + len(rejects) == count
  assert rejects.settle('quarantine', side) == len(rejects)
  for line in side.read_bytes().splitlines() if len(rejects) else ():
    assert {'source', 'number', 'reason', 'raw', 'field'} == set(json.loads(line))
  if len(rejects):
    with pytest.raises(DataError, match=r'rows\.jsonl:\d+: '):
      rejects.settle('strict', None)
  event(f'{drawn[0]}: spoilt and still a record', len(records) - len(wanted))


@given(files())
@fuzz(150)
def test_what_is_read_becomes_tokens(
  folder: Path, drawn: tuple[str, list[bytes], list[int]]
) -> None:
  """Of spoilt lines that are records none trips the tokenizer: its refusals are ours."""
  content, _ = mixed(*drawn)
  path = folder / 'tokens.jsonl'
  path.write_bytes(content)
  config = DataConfig(
    source='jsonl',
    path=str(path),
    held_out=0.0,
    on_error='quarantine',
    prompt_length=12,
    response_length=8,
  )
  feedback = sources.load(config, folder / 'side.jsonl')
  assert len(feedback.fingerprint) == 64
  for kind, count in feedback.train.sizes.items():
    try:
      columns = pipeline.encode(kind, getattr(feedback.train, kind), TOKENIZER, config)
    except DataError:
      continue
    assert len(columns) == count


@given(
  st.integers(10, 2000), st.binary(min_size=0, max_size=20), st.booleans(), st.sampled_from([1, 6])
)
# Damage that makes lines of another form, more than there are good ones before it.
@example(200, b'@&', False, 1)
@fuzz(300)
def test_a_spoilt_gzip_file_keeps_the_lines_before(
  folder: Path, place: int, junk: bytes, cut: bool, level: int
) -> None:
  """Lines whose compressed bytes are all before the damage are records."""
  rows, records = good('rating')
  noise = random.Random(place)
  rows = [row[:-1] + b', "noise": "' + noise.randbytes(20).hex().encode() + b'"}' for row in rows]
  whole = gzip.compress(b'\n'.join([*rows, b'']), level)
  place = min(place, len(whole))
  path = folder / 'rows.jsonl.gz'
  path.write_bytes(whole[:place] + junk + (b'' if cut else whole[place + len(junk) :]))
  member = jsonl.lines.zlib.decompressobj(31)
  before = member.decompress(whole[:place]).count(b'\n')
  rejects = Rejects()
  found = jsonl.read(str(path), rejects)
  assert found[:before] == records[:before]
  assert found == records[: len(found)] or rejects.damage
