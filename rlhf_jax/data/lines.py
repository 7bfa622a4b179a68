"""Lines of a file, plain or .gz, whatever state it is in: all that can be read, then what is wrong.

Python's gzip module throws away what it has decompressed of a block when the block turns out to be
damaged, and good lines with it; here nothing before the damage is lost.
"""

import pathlib
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from rlhf_jax.common.errors import DataError

# A longer line is not read: a file without line ends, or a gzip bomb, must not fill the memory.
LONGEST = 2**26
# What is kept of such a line.
_SHOWN = 200
_BLOCK = 2**20
# Of compressed bytes, of which deflate makes at most about a thousand times as many.
_COMPRESSED_BLOCK = 2**14
_GZIP = zlib.MAX_WBITS + 16
# What zlib says of what does not begin as a member does.
_NO_MEMBER = 'incorrect header check'


class DamageError(DataError):
  """A file that cannot be read any further; everything before has been yielded."""


class Line(NamedTuple):
  """A line that is not blank.

  Attributes:
    number: from 1.
    content: without its end; of a line longer than LONGEST the beginning.
    ended: whether a line end follows; without one the line may have been cut.
    whole: whether the content is all of it.
  """

  number: int
  content: bytes
  ended: bool
  whole: bool


def read(path: str) -> Iterator[Line]:
  """The lines of a file that are not blank.

  Raises:
    DataError: the file is missing or cannot be opened.
    DamageError: after the last line that there is in a damaged gzip file.
  """
  number, pieces, size = 1, list[bytes](), 0

  def line(ended: bool) -> Line | None:
    content, whole = b''.join(pieces), size <= LONGEST
    if ended:
      content = content.removesuffix(b'\r')
    found = Line(number, content if whole else content[:_SHOWN], ended, whole)
    return found if content.strip() else None

  damage = None
  blocks = _blocks(path)
  while True:
    try:
      block = next(blocks, None)
    except DamageError as error:
      damage, block = error, None
    if block is None:
      break
    for position, piece in enumerate(block.split(b'\n')):
      if position:
        if found := line(ended=True):
          yield found
        number, pieces, size = number + 1, [], 0
      size += len(piece)
      # Of what is too long the first piece is enough to show.
      if size <= LONGEST or not pieces:
        pieces.append(piece)
  if found := line(ended=False):
    yield found
  if damage is not None:
    raise damage


def _blocks(path: str) -> Iterator[bytes]:
  try:
    with open(path, 'rb') as file:
      if pathlib.Path(path).suffix == '.gz':
        yield from _inflated(file)
      else:
        while block := file.read(_BLOCK):
          yield block
  except FileNotFoundError:
    raise DataError(f'{path}: no such file. Check --config.data.path.') from None
  except OSError as error:
    raise DataError(f'{path}: cannot be read ({error.strerror}). Check the path.') from error


def _inflated(file: BinaryIO) -> Iterator[bytes]:
  """What a file of gzip members holds; raises DamageError after all that there is before damage."""
  member, rest = None, b''
  while block := rest or file.read(_COMPRESSED_BLOCK):
    rest = b''
    if member is None:
      block = block.lstrip(b'\0')  # padding, as of tapes
      if not block:
        continue
      member = zlib.decompressobj(_GZIP)
    before = member.copy()
    try:
      made = member.decompress(block)
    except zlib.error as error:
      yield from _bytewise(before, block)
      reason = str(error).rpartition(': ')[2]
      if reason != _NO_MEMBER:
        # What is wrong may stand long before it shows.
        reason += ', so that lines before may be damaged too'
      raise DamageError(f'not a whole gzip file ({reason})') from error
    yield made
    rest = member.unused_data
    if member.eof:
      member = None
  if member is not None:
    raise DamageError('not a whole gzip file (it ends too early)')


def _bytewise(member: 'zlib._Decompress', block: bytes) -> Iterator[bytes]:
  """What comes of a block up to the byte that cannot be."""
  for position in range(len(block)):
    try:
      yield member.decompress(block[position : position + 1])
    except zlib.error:
      return
