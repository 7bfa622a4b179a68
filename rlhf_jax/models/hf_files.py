"""Files of tensors: their headers, how they are found, and written shard by shard."""

import json
import pathlib
import re
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rlhf_jax.common.errors import CheckpointError

SINGLE, INDEX, CONFIG = 'model.safetensors', 'model.safetensors.index.json', 'config.json'
DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}
SHARD_BYTES = 5 * 10**9  # as transformers once had it

_PICKLED = re.compile(r'.*\.(bin|pt|pth|ckpt)')


class Header(NamedTuple):
  """What a file says of a tensor in it."""

  file: pathlib.Path
  name: str
  dtype: str
  shape: tuple[int, ...]


class Entry(NamedTuple):
  """A tensor that is to be written.

  Attributes:
    name: its name.
    shape: its shape.
    dtype: one of `DTYPES`' values.
    read: gives it, in that type.
  """

  name: str
  shape: tuple[int, ...]
  dtype: str
  read: Callable[[], np.ndarray]

  @property
  def size(self) -> int:
    """In bytes."""
    return int(np.prod(self.shape, dtype=np.int64)) * numpy_dtype(self.dtype).itemsize


def numpy_dtype(name: str) -> np.dtype:
  """NumPy's type of a name."""
  return np.dtype(ml_dtypes.bfloat16 if name == 'bfloat16' else name)


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of tensors; of a sharded checkpoint those that its index names."""
  held = [path.name for path in folder.iterdir() if path.is_file()]
  return [folder / name for name in names_of(folder, held, str(folder))]


def names_of(folder: pathlib.Path, held: Collection[str], where: str) -> list[str]:
  """The names of the files of tensors.

  Args:
    folder: where the index is, if there is one.
    held: the names of all files, which need not be here yet.
    where: whose files they are, for messages.

  Raises:
    CheckpointError: the index is damaged, it names what is not held, or nothing can be read.
  """
  if SINGLE in held:
    return [SINGLE]
  index = folder / INDEX
  if index.is_file():
    try:
      names = sorted(set(json.loads(index.read_text(encoding='utf-8'))['weight_map'].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise CheckpointError(f'{index}: damaged ({error!r}).') from error
    outside = [name for name in names if not is_plain(name)]
    if outside:
      raise CheckpointError(f'{index}: names {outside[0]!r:.200}, which is no file of its folder.')
    absent = [name for name in names if name not in held]
    if absent:
      raise CheckpointError(f'{index}: names {", ".join(absent)}, which {where} does not hold.')
    return names
  pickled = sorted(name for name in held if _PICKLED.fullmatch(name))
  if pickled:
    raise CheckpointError(
      f'{where}: it has {pickled[0]} but no {SINGLE}. Files that torch pickled can run code, and '
      'are not read. Convert them with torch and transformers: '
      'AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto").save_pretrained(NEW_FOLDER).'
    )
  raise CheckpointError(f'{where}: there is neither {SINGLE} nor {INDEX}.')


def is_plain(name: Any) -> bool:
  """Whether what a file of a folder names is another file of it, not a path to somewhere else."""
  return isinstance(name, str) and name not in ('', '.', '..') and not set(name) & set('/\\\0')


def headers_of(file: pathlib.Path) -> Iterator[tuple[str, Header]]:
  """The names, types and shapes in a file of safetensors, from its header."""
  try:
    with file.open('rb') as stream:
      (size,) = struct.unpack('<Q', stream.read(8))
      if size > file.stat().st_size:
        raise ValueError('the header is longer than the file')
      header = json.loads(stream.read(size))
    if not isinstance(header, dict):
      raise ValueError('its header is no object')
    header.pop('__metadata__', None)
    found = [
      (name, Header(file, name, str(entry['dtype']), tuple(map(int, entry['shape']))))
      for name, entry in header.items()
    ]
    end = max((entry['data_offsets'][1] for entry in header.values()), default=0)
    if 8 + size + end > file.stat().st_size:
      raise ValueError('it ends early')
  except (ValueError, KeyError, IndexError, TypeError, struct.error) as error:
    raise CheckpointError(f'{file}: not a whole file of safetensors ({error}).') from error
  yield from found


def write_tensors(
  folder: pathlib.Path, entries: Sequence[Entry], shard_bytes: int = SHARD_BYTES
) -> None:
  """Writes tensors in order, one at a time, into shards of at most `shard_bytes` with an index.

  A tensor that is larger has a shard of its own. One shard is written without an index.
  """
  shards: list[list[Entry]] = [[]]
  for entry in entries:
    if shards[-1] and sum(other.size for other in shards[-1]) + entry.size > shard_bytes:
      shards.append([])
    shards[-1].append(entry)
  if len(shards) == 1:
    write_file(folder / SINGLE, shards[0])
    return
  weight_map: dict[str, str] = {}
  for number, shard in enumerate(shards, 1):
    name = f'model-{number:05}-of-{len(shards):05}.safetensors'
    write_file(folder / name, shard)
    weight_map |= {entry.name: name for entry in shard}
  total = sum(entry.size for entry in entries)
  write_json(folder / INDEX, {'metadata': {'total_size': total}, 'weight_map': weight_map})


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  """Writes a JSON file as transformers does."""
  path.write_text(json.dumps(values, indent=2, sort_keys=True) + '\n', encoding='utf-8')


def write_file(path: pathlib.Path, entries: Sequence[Entry]) -> None:
  """One file of safetensors: the length of a JSON header, the header, the bytes of the tensors."""
  codes = {name: code for code, name in DTYPES.items()}
  # transformers reads only files that say for which library they are.
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  start = 0
  for entry in entries:
    header[entry.name] = {
      'dtype': codes[entry.dtype],
      'shape': list(entry.shape),
      'data_offsets': [start, start + entry.size],
    }
    start += entry.size
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  with path.open('wb') as file:
    file.write(struct.pack('<Q', len(text)) + text)
    for entry in entries:
      values = entry.read()
      assert values.shape == entry.shape and values.dtype == numpy_dtype(entry.dtype), entry.name
      little = values.dtype.newbyteorder('<')
      file.write(np.ascontiguousarray(values, little).reshape(-1).view(np.uint8).data)
