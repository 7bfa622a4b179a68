"""Times and their limits: medians over repetitions, plain products and copies of large arrays."""

import contextlib
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.common.errors import UserError

# Side of the square matrices whose product is the ceiling.
_SIDE = {'cpu': 2048}
_ACCELERATOR_SIDE = 8192
# Numbers of the array whose copy is the limit of memory: more than any cache holds.
_COPIED = {'cpu': 2**26}
_ACCELERATOR_COPIED = 2**29
_PROC = pathlib.Path('/proc')
_COMPILED = '/jax/core/compile/backend_compile_duration'
# What of /proc/stat is work: user, nice, system, irq, softirq, steal.
_BUSY = (0, 1, 2, 5, 6, 7)
# From this share of the cores on, work of others makes numbers worthless.
DISTURBED = 0.05

# A step gives the seconds of its parts; most have one.
Step = Callable[[], dict[str, float]]


def timed(step: Callable[[], Any], repeats: int) -> list[float]:
  """Seconds of each of so many calls, until their results are there."""
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(step())
    seconds.append(time.perf_counter() - start)
  return seconds


def ceiling(dtype: str, repeats: int = 5) -> float:
  """Operations a second of a product of large square matrices, the best of several."""
  side = _SIDE.get(jax.default_backend(), _ACCELERATOR_SIDE)
  a, b = (
    jax.random.normal(jax.random.key(number), (side, side), dtype=jnp.dtype(dtype))
    for number in range(2)
  )
  product = jax.jit(jnp.matmul)
  jax.block_until_ready(product(a, b))
  return 2 * side**3 / min(timed(lambda: product(a, b), repeats))


def bandwidth(repeats: int = 5) -> float:
  """Bytes a second that a copy of a large array reads and writes, the best of several."""
  count = _COPIED.get(jax.default_backend(), _ACCELERATOR_COPIED)
  source = jnp.zeros(count, jnp.float32)
  # A plain copy may be left out.
  copy = jax.jit(lambda array: array + 1)
  jax.block_until_ready(copy(source))
  return 2 * source.nbytes / min(timed(lambda: copy(source), repeats))


def spread(values: Sequence[float]) -> dict[str, float]:
  """The median, and the least and the most."""
  return {'median': statistics.median(values), 'least': min(values), 'most': max(values)}


class Rounds(NamedTuple):
  """What was measured, our step and the peer's in turn.

  Attributes:
    ours: by part, seconds of each round.
    peer: the same; empty without a peer.
  """

  ours: dict[str, list[float]]
  peer: dict[str, list[float]]

  def summary(self) -> dict[str, dict[str, Any]]:
    """By part: spreads of 'ours' and, with a peer, of 'peer' and of its seconds over ours.

    The ratio is that of pairs, each measured one right after the other: what slows the machine for
    a while slows both.
    """
    found: dict[str, dict[str, Any]] = {}
    for part, ours in self.ours.items():
      found[part] = {'ours': {**spread(ours), 'all': ours}}
      if self.peer:
        theirs = self.peer[part]
        ratios = [their / our for their, our in zip(theirs, ours, strict=True)]
        found[part] |= {'peer': {**spread(theirs), 'all': theirs}, 'ratio': spread(ratios)}
    return found


@contextlib.contextmanager
def compiling() -> Iterator[list[float]]:
  """A list of the seconds that XLA compiles within, or reads what it has compiled before."""
  seconds: list[float] = []

  def heard(event: str, duration_secs: float, **_: str | int) -> None:
    if event == _COMPILED:
      seconds.append(duration_secs)

  jax.monitoring.register_event_duration_secs_listener(heard)
  try:
    yield seconds
  finally:
    jax.monitoring.unregister_event_duration_listener(heard)


def threads() -> int:
  """How many cores this process may use: as many threads compute."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


# Seconds between a step and the other's. Threads of OpenMP, which torch has, spin for a while after
# it, while they wait for more work: the next step would pay for that.
PAUSE = 0.5


def alternate(ours: Step, peer: Step | None, repeats: int) -> Rounds:
  """Our step, the peer's, our step, ...: so many of each; None: ours alone."""
  rounds = Rounds({}, {})
  for _ in range(repeats):
    for step, kept in ((ours, rounds.ours), (peer, rounds.peer)):
      if peer is not None:
        time.sleep(PAUSE)
      for part, seconds in ({} if step is None else step()).items():
        kept.setdefault(part, []).append(seconds)
  return rounds


def peak_bytes() -> dict[str, int | None]:
  """The most memory so far: of this process, and of its first device where that tells."""
  of_device = jax.local_devices()[0].memory_stats() or {}
  host = peak_of(os.getpid())
  return {
    'host': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if host is None else host,
    'device': of_device.get('peak_bytes_in_use'),
  }


def peak_of(process: int) -> int | None:
  """The most memory a process had so far, in bytes; None where the system does not tell.

  Its resource usage would not do: there a program starts with the peak of the one it came from.
  """
  for line in _lines(_PROC / str(process) / 'status'):
    if line.startswith('VmHWM:'):
      return int(line.split()[1]) * 1024
  return None


class Load:
  """How busy others keep the cores, from its making on."""

  def __init__(self, processes: Iterable[int] = ()) -> None:
    """`processes` are ours beside this one and those that it has waited for."""
    self._processes = tuple(processes)
    self._start = self._now()

  def others(self) -> float | None:
    """The share of all cores that other processes used; None where the system does not tell."""
    start, now = self._start, self._now()
    if start is None or now is None:
      return None
    wall, busy, own = (after - before for before, after in zip(start, now, strict=True))
    return max(0.0, busy - own) / (wall * (os.cpu_count() or 1))

  def _now(self) -> tuple[float, float, float] | None:
    """Seconds: of the clock, of all cores' work, and of ours."""
    ticks = os.sysconf('SC_CLK_TCK')
    total = next((line.split()[1:] for line in _lines(_PROC / 'stat')), None)
    if total is None:
      return None
    own = sum(os.times()[:4])
    for process in self._processes:
      for line in _lines(_PROC / str(process) / 'stat'):
        # The name before it may have spaces and brackets.
        fields = line.rpartition(')')[2].split()
        own += sum(map(int, fields[11:13])) / ticks
    return time.perf_counter(), sum(int(total[field]) for field in _BUSY) / ticks, own


def _lines(path: pathlib.Path) -> Iterator[str]:
  try:
    yield from path.read_text(encoding='utf-8').splitlines()
  except OSError:
    return


def backend() -> str:
  """What jax computes on here, found out in another process.

  One that has an accelerator holds most of its memory, which programs that come first need.
  Raises UserError if jax does not start.
  """
  command = [sys.executable, '-c', 'import jax; print(jax.default_backend())']
  found = subprocess.run(command, capture_output=True, text=True, check=False)
  if found.returncode:
    raise UserError(f'jax: it does not start here ({found.stderr.strip().splitlines()[-1]}).')
  return found.stdout.split()[-1]


def machine() -> dict[str, Any]:
  """What the numbers were measured on."""
  return {
    'device': jax.devices()[0].device_kind,
    'devices': jax.device_count(),
    'processor': processor(),
    'cores': os.cpu_count(),
    'jax': jax.__version__,
    'python': platform.python_version(),
  }


def processor() -> str:
  """The model of the processor, or its kind where the system does not tell."""
  for line in _lines(_PROC / 'cpuinfo'):
    if line.startswith('model name'):
      return line.partition(':')[2].strip()
  return platform.machine()
