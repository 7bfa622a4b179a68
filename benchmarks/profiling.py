"""Where the time of a loop goes: how long the device waits, and which operations take longest."""

import collections
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax

# Lines of a device's plane that sum up what is in the others.
_SUMS = ('Steps', 'XLA Modules')
# A processor's programs: what runs their operations.
_EXECUTOR = 'ThunkExecutor::Execute'
# Their time is that of the operations within.
_HOLDERS = re.compile(r'(while|call|conditional)\b')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', re.MULTILINE)


class Operation(NamedTuple):
  """What a compiled program does for one operation of the source, in all its layers and rounds.

  Attributes:
    program: that it is part of.
    name: of the operation in the source; what the compiler calls it where that is not known.
    seconds: that it took in all, on all devices; operations may run beside each other.
  """

  program: str
  name: str
  seconds: float


class Profile(NamedTuple):
  """What was seen of a loop.

  Attributes:
    seconds: from its start to its end.
    busy: seconds in which the device had compiled work in hand, the mean over devices; None where
      the profiler saw none.
    operations: the costliest first.
  """

  seconds: float
  busy: float | None
  operations: list[Operation]

  @property
  def idle_share(self) -> float | None:
    """How much of the time the device waited for the host."""
    return None if self.busy is None else max(0.0, 1 - self.busy / self.seconds)


class _Event(NamedTuple):
  """Compiled work on a device, in nanoseconds; `name` is '' where operations are summed up."""

  device: str
  start: float
  end: float
  program: str
  name: str


def profile(run: Callable[[], None], folder: pathlib.Path) -> Profile:
  """Runs a loop, which has been compiled before and ends when its work is done.

  A trace of `jax.profiler` says when compiled work ran, whatever dispatched it, so that host work
  counts as waiting wherever it stands: in making a batch, between programs, in reading metrics.
  To time the programs by themselves would take each of them, with its arguments, out of recipes
  that keep them to themselves. On processors what a profile reads are the executors of programs,
  all devices together: they share the cores.

  Args:
    run: the loop.
    folder: where the trace is written, for TensorBoard or Perfetto.
  """
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  jax.profiler.start_trace(folder, profiler_options=options)
  try:
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
  finally:
    jax.profiler.stop_trace()
  newest = max(folder.rglob('*.xplane.pb'), key=lambda file: file.stat().st_mtime)
  return summary(list(_events(newest)), seconds)


def summary(events: list[_Event], seconds: float) -> Profile:
  """The profile of a loop of so many seconds, from what ran meanwhile."""
  origins = _origins({event.program for event in events})
  spans: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
  spent: dict[tuple[str, str], float] = collections.defaultdict(float)
  for event in events:
    spans[event.device].append((event.start, event.end))
    if event.name and not _HOLDERS.match(event.name):
      name = origins.get((event.program, event.name), event.name)
      spent[event.program, name] += (event.end - event.start) / 1e9
  busy = [_covered(each) / 1e9 for each in spans.values()]
  operations = [Operation(*key, seconds) for key, seconds in spent.items()]
  operations.sort(key=lambda operation: -operation.seconds)
  return Profile(seconds, statistics.mean(busy) if busy else None, operations)


def _covered(spans: Iterable[tuple[float, float]]) -> float:
  """How long at least one of the spans lasts."""
  total = latest = 0.0
  for start, end in sorted(spans):
    if end > latest:
      total += end - max(start, latest)
      latest = end
  return total


def _events(file: pathlib.Path) -> Iterator[_Event]:
  on_cpu = jax.default_backend() == 'cpu'
  for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
    if not plane.name.startswith('/host:CPU' if on_cpu else ('/device:GPU', '/device:TPU')):
      continue
    for line in plane.lines:
      for event in line.events if line.name not in _SUMS else ():
        stats: dict[Any, Any] = dict(event.stats)
        operation = str(stats.get('hlo_op', '' if on_cpu else event.name))
        if operation or event.name.startswith(_EXECUTOR):
          end = event.start_ns + event.duration_ns
          program = str(stats.get('hlo_module', ''))
          yield _Event(plane.name, event.start_ns, end, program, operation)


def _origins(programs: set[str]) -> dict[tuple[str, str], str]:
  """By program and operation, what it serves, as the compiled programs say."""
  found = {}
  for executable in jax.devices()[0].client.live_executables():
    for module in executable.hlo_modules():
      if module.name in programs:
        for name, origin in _INSTRUCTION.findall(module.to_string()):
          found[module.name, name] = origin
  return found
