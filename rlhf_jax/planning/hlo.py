"""What a compiled program says of itself: collectives and large arrays, read from its HLO text.

Shapes in the text are those of one device. What stands in a loop is counted as often as the loop
runs: the compiler writes down how often, where it knows.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_SIZES = {
  'pred': 1,
  's4': 0.5,
  'u4': 0.5,
  's8': 1,
  'u8': 1,
  's16': 2,
  'u16': 2,
  'bf16': 2,
  'f16': 2,
  's32': 4,
  'u32': 4,
  'f32': 4,
  's64': 8,
  'u64': 8,
  'f64': 8,
  'c64': 8,
  'c128': 16,
}
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$')
_ARRAY = re.compile(r'([a-z]+\d*)\[([\d,]*)\]')
_CALLED = re.compile(
  r'(?:body|calls|to_apply|branch_computations|called_computations)='
  r'(\{[^}]*\}|%?[\w.\-]+)'
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS = re.compile(
  r'replica_groups=(\{\{[\d,{} ]*\}\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|mesh\[.*?\] \{.*?\})'
)
_IOTA = re.compile(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
_MESH = re.compile(r'mesh\[(.*?)\] \{(.*?)\}')
_MESH_AXIS = re.compile(r"'(\w+)'=(\d+)")
_MESH_PART = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")
_PAIRS = re.compile(r'source_target_pairs=\{(.*?)\}\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
# These make no array of their own: they hand others on.
_VIEWS = frozenset(
  (
    'parameter',
    'tuple',
    'get-tuple-element',
    'bitcast',
    'while',
    'conditional',
    'call',
    'opt-barrier',
    'constant',
    'after-all',
    'partition-id',
  )
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective operation of a program.

  Attributes:
    kind: 'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all' or 'collective-permute'.
    axes: names of the mesh axes it runs over, joined by '+'.
    bytes: that each device sends, each time, by the ring algorithms of NCCL.
    times: how often it runs.
    origin: the operation in the source that it serves.
  """

  kind: str
  axes: str
  bytes: float
  times: int
  origin: str

  @property
  def total(self) -> float:
    """Bytes that each device sends in all."""
    return self.bytes * self.times


@dataclasses.dataclass(frozen=True)
class LargeArray:
  """An array that a program makes: its text like 'f32[8,128]', bytes, and the operation."""

  text: str
  bytes: float
  origin: str


@dataclasses.dataclass(frozen=True)
class Program:
  """What was read.

  Attributes:
    collectives: all of them.
    arrays: those that the program makes, largest first, each shape and origin once.
    unknown_loops: how many loops the compiler does not know the length of.
  """

  collectives: tuple[Collective, ...]
  arrays: tuple[LargeArray, ...]
  unknown_loops: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
  type: str
  opcode: str
  rest: str


def read(text: str, mesh: Mapping[str, int], unknown_trips: int = 1) -> Program:
  """Reads the text of a compiled program.

  Args:
    text: from `compiled.as_text()`.
    mesh: sizes of the mesh axes, in the order in which devices are numbered.
    unknown_trips: how often a loop is taken to run of which the compiler does not know.
  """
  computations, entry = _parse(text)
  times, fused, unknown = _executions(computations, entry, unknown_trips)
  collectives: list[Collective] = []
  arrays: dict[tuple[str, str], LargeArray] = {}
  for name, instructions in computations.items():
    if name in fused or not times.get(name):
      continue
    for each in instructions:
      kind = each.opcode.removesuffix('-start')
      if kind in _COLLECTIVES:
        collectives.append(_collective(each, kind, times[name], mesh))
      if each.opcode in _VIEWS or each.opcode.endswith('-done'):
        continue
      for array in _arrays(each):
        arrays.setdefault((array.text, array.origin), array)
  ordered = sorted(arrays.values(), key=lambda array: -array.bytes)
  return Program(tuple(collectives), tuple(ordered), unknown)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  """The instructions of each computation, and the name of the first to run."""
  computations: dict[str, list[_Instruction]] = {}
  entry, current = '', None
  for line in text.splitlines():
    if line.startswith('}'):
      current = None
    elif current is None:
      if found := _COMPUTATION.match(line):
        current = computations.setdefault(found[2], [])
        entry = found[2] if found[1] else entry
    elif found := _INSTRUCTION.match(line):
      current.append(_Instruction(found[2], found[3], found[4]))
  return computations, entry


def _executions(
  computations: dict[str, list[_Instruction]], entry: str, unknown_trips: int
) -> tuple[dict[str, int], set[str], int]:
  """How often each computation runs, which are inside of single instructions, unknown loops."""
  times: dict[str, int] = {}
  fused: set[str] = set()
  unknown = 0
  # Callers come after those they call in the text; a stack visits them the other way round.
  waiting = [(entry, 1)]
  while waiting:
    name, count = waiting.pop()
    times[name] = times.get(name, 0) + count
    for each in computations.get(name, ()):
      trips = 1
      if each.opcode == 'while':
        known = _TRIPS.search(each.rest)
        unknown += known is None
        trips = int(known[1]) if known else unknown_trips
      for called in _called(each):
        if each.opcode not in ('while', 'conditional', 'call') and 'async' not in each.opcode:
          fused.add(called)
        waiting.append((called, count * trips))
  return times, fused, unknown


def _called(each: _Instruction) -> Iterator[str]:
  for found in _CALLED.findall(each.rest):
    for name in found.strip('{}').split(','):
      yield name.strip().lstrip('%')


def _size(dtype: str, shape: str) -> float:
  return _SIZES.get(dtype, 0) * math.prod(int(size) for size in shape.split(',') if size)


def _arrays(each: _Instruction) -> Iterator[LargeArray]:
  name = _OP_NAME.search(each.rest)
  for dtype, shape in _ARRAY.findall(each.type):
    yield LargeArray(f'{dtype}[{shape}]', _size(dtype, shape), name[1] if name else each.opcode)


def _collective(each: _Instruction, kind: str, times: int, mesh: Mapping[str, int]) -> Collective:
  arrays = list(_ARRAY.findall(each.type))
  if each.opcode.endswith('-start') and len(arrays) > 1:
    arrays = arrays[len(arrays) // 2 :]  # operands and results
  result = sum(_size(*array) for array in arrays)
  group = _first_group(each.rest)
  count = len(group)
  # Of a ring of n, each device sends (n - 1) parts of n; an all-reduce is two of them.
  share = (count - 1) / count if count else 0.0
  sent = {
    'all-gather': result * share,
    'all-reduce': 2 * result * share,
    'reduce-scatter': result * (count - 1),
    'all-to-all': result * share,
    'collective-permute': result,
  }[kind]
  name = _OP_NAME.search(each.rest)
  return Collective(kind, _axes(group, mesh), sent, times, name[1] if name else each.opcode)


def _first_group(rest: str) -> list[int]:
  """The devices of the first group of a collective (of a permutation, one pair)."""
  if pairs := _PAIRS.search(rest):
    moved = [pair.strip('{} ').split(',') for pair in pairs[1].split('},')]
    apart = [pair for pair in moved if len(pair) == 2 and pair[0] != pair[1]]
    return [int(number) for number in apart[0]] if apart else []
  found = _GROUPS.search(rest)
  if not found:
    return []
  if found[1].startswith('{{'):
    return [int(number) for number in found[1][2:].split('}')[0].split(',') if number.strip()]
  if named := _MESH.match(found[1]):
    return _group_of_mesh(named[1], named[2])
  iota = _IOTA.match(found[1])
  assert iota is not None, found[1]
  # Devices 0, 1, ... in the shape after <=, transposed, then cut into [groups, size].
  sizes = [int(size) for size in iota[2].split(',')]
  order = [int(axis) for axis in iota[3].split(',')] if iota[3] else list(range(len(sizes)))
  strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
  size = int(iota[1].split(',')[-1])
  return _numbered([(sizes[axis], strides[axis]) for axis in order])[:size]


def _group_of_mesh(mesh: str, axes: str) -> list[int]:
  """The first group along axes of a mesh of the compiler's own, each whole or a part of it.

  A part `'x':(a)b` is what is left of axis x inside of its first factor a, b long.
  """
  sizes = {name: int(size) for name, size in _MESH_AXIS.findall(mesh)}
  names = list(sizes)
  strides = {name: math.prod(sizes[n] for n in names[i + 1 :]) for i, name in enumerate(names)}
  parts = []
  for name, before, size in _MESH_PART.findall(axes):
    inside = sizes[name] // (int(before) * int(size)) if size else 1
    parts.append((int(size) if size else sizes[name], strides[name] * inside))
  return _numbered(parts)


def _numbered(axes: list[tuple[int, int]]) -> list[int]:
  """Device numbers along axes of (size, stride), the last axis fastest."""
  group = [0]
  for size, stride in axes:
    group = [device + place * stride for device in group for place in range(size)]
  return group


def _axes(group: list[int], mesh: Mapping[str, int]) -> str:
  """The mesh axes along which the devices of a group differ."""
  found = []
  stride = math.prod(mesh.values())
  for name, size in mesh.items():
    stride //= size
    if len({device // stride % size for device in group}) > 1:
      found.append(name)
  return '+'.join(found) or 'none'
