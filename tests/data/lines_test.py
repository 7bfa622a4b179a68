"""Whatever state a file is in, no line before the damage is lost."""

import gzip
import itertools
import random
import zlib
from pathlib import Path

import pytest

from rlhf_jax.data import lines

ROWS = [f'{number} {"x" * (number * 37 % 900)}'.encode() for number in range(1, 400)]
TEXT = b'\n'.join(ROWS) + b'\n'


def read(path: Path, content: bytes) -> tuple[list[bytes], str]:
  """The lines of a file with this content, and what is said of its damage."""
  path.write_bytes(content)
  found = []
  try:
    for line in lines.read(str(path)):
      found.append(line.content)
  except lines.DamageError as damage:
    return found, str(damage)
  return found, ''


def inflated(compressed: bytes) -> bytes:
  """What zlib makes of the beginning of a member, a byte at a time: the slow reference."""
  member = zlib.decompressobj(31)
  return b''.join(member.decompress(bytes([byte])) for byte in compressed)


def test_lines_are_those_of_splitting_at_line_feeds(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  content = b'\xef\xbb\xbfa\r\n\n \t\nb\rc\n\xe2\x80\xa8d\x0c\n\r\nlast'
  expected = [(1, b'\xef\xbb\xbfa', True), (4, b'b\rc', True), (5, b'\xe2\x80\xa8d\x0c', True)]
  expected.append((7, b'last', False))
  for block in (1, 2, 3, 2**20):
    monkeypatch.setattr(lines, '_BLOCK', block)
    (tmp_path / 'a').write_bytes(content)
    found = [(line.number, line.content, line.ended) for line in lines.read(str(tmp_path / 'a'))]
    assert found == expected
    (tmp_path / 'a.gz').write_bytes(gzip.compress(content))
    assert [line[:3] for line in lines.read(str(tmp_path / 'a.gz'))] == expected


@pytest.mark.parametrize('level', [0, 1, 9])
def test_members_follow_each_other_and_padding_is_nothing(tmp_path: Path, level: int) -> None:
  parts = [gzip.compress(part, level) for part in (TEXT[:1000], b'', TEXT[1000:])]
  content = b''.join(parts) + bytes(70_000)
  assert gzip.decompress(content) == TEXT
  assert read(tmp_path / 'a.gz', content) == (ROWS, '')
  assert read(tmp_path / 'a.gz', b'') == ([], '')


@pytest.mark.parametrize('level', [1, 6])
def test_a_cut_file_keeps_every_line_before_the_cut(tmp_path: Path, level: int) -> None:
  whole = gzip.compress(TEXT, level)
  for end in [*range(1, 30), *range(30, len(whole), 97), len(whole) - 1]:
    found, damage = read(tmp_path / 'a.gz', whole[:end])
    assert found == [row for row in inflated(whole[:end]).split(b'\n') if row]
    assert damage == 'not a whole gzip file (it ends too early)'


def test_a_flipped_byte_costs_no_line_before_it(tmp_path: Path) -> None:
  """The reference stops at the byte before the flipped one."""
  whole = gzip.compress(TEXT)
  drawn = random.Random(0)
  for place in range(10, len(whole), 61):
    flipped = bytearray(whole)
    flipped[place] ^= drawn.randrange(1, 256)
    found, damage = read(tmp_path / 'a.gz', bytes(flipped))
    kept = inflated(whole[:place]).split(b'\n')[:-1]
    assert found[: len(kept)] == kept
    assert damage, 'the checksum at least is wrong'


def test_a_wrong_checksum_says_that_it_is_not_known_which_line_is_wrong(tmp_path: Path) -> None:
  whole = bytearray(gzip.compress(TEXT, 0))
  whole[len(whole) // 2] ^= 1
  found, damage = read(tmp_path / 'a.gz', bytes(whole))
  assert len(found) == len(ROWS) and found != ROWS
  assert damage.endswith('(incorrect data check, so that lines before may be damaged too)')


def test_what_follows_a_member_and_is_none_is_damage(tmp_path: Path) -> None:
  found, damage = read(tmp_path / 'a.gz', gzip.compress(TEXT) + b'junk')
  assert (found, damage) == (ROWS, 'not a whole gzip file (incorrect header check)')


def test_a_line_that_would_fill_the_memory_is_not_kept(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """The lines on either side are; a gzip bomb is no other case."""
  monkeypatch.setattr(lines, 'LONGEST', 2**20)
  content = b'a\n' + b'x' * 2**20 + b'\n' + b'y' * (2**20 + 1) + b'\nb\n'
  for name, written in (('a', content), ('a.gz', gzip.compress(content))):
    (tmp_path / name).write_bytes(written)
    found = list(lines.read(str(tmp_path / name)))
    assert [line.number for line in found] == [1, 2, 3, 4]
    assert [line.whole for line in found] == [True, True, False, True]
    assert [len(line.content) for line in found] == [1, 2**20, 200, 1]
    assert found[2].content == b'y' * 200


def test_a_line_is_yielded_before_the_next_is_read(tmp_path: Path) -> None:
  """A bad byte far behind does not keep the first lines back."""
  whole = gzip.compress(TEXT * 20)
  (tmp_path / 'a.gz').write_bytes(whole[:-9] + b'\0' * 9)
  first = list(itertools.islice(lines.read(str(tmp_path / 'a.gz')), 3))
  assert [line.content for line in first] == ROWS[:3]
