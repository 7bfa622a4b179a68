"""Numbers of jobs as people read them: lines of a program, and rows of a table."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.measuring import DISTURBED
from rlhf_jax.common.errors import UserError

# Ours beside a peer's, whose name is to be filled in.
HEAD = (
  '| Job | Part | Ours, s | Our speed | Of the ceiling | {0}, s | {0} / ours | '
  'Memory, GB: ours, {0} | Others |',
  '| :-- | :-- | --: | --: | --: | --: | --: | --: | --: |',
)
# What is behind our numbers.
HEAD_OURS = (
  '| Job | Ceiling, GFLOP/s | Of the bandwidth | Compiling, s | Waits for the host | '
  'Rollout, score, update, s | Memory, GB: host, device |',
  '| :-- | --: | --: | --: | --: | --: | --: |',
)


def lines(numbers: dict[str, Any]) -> list[str]:
  """What is printed of a job's numbers."""
  name = f'{numbers["job"]} {numbers["size"]}'
  found = [
    f'{name}: {", ".join(_seconds(part, row["ours"]) for part, row in numbers["seconds"].items())}'
  ]
  if 'utilisation' in numbers:
    found += [
      f'{numbers["tokens_per_second"]:,.0f} tokens/s, {numbers["utilisation"]:.0%} of '
      f'{numbers["ceiling_flops_per_second"] / 1e9:,.0f} GFLOP/s',
      f'loaded in {numbers["loading_seconds"]:.1f} s; first step '
      f'{numbers["first_seconds"]["step"]:.1f} s, {numbers["compile_seconds"]:.1f} s of compiling',
    ]
  if 'bandwidth_share' in numbers:
    found.append(
      f'weights and cache are read at {numbers["bandwidth_share"]:.0%} of '
      f'{numbers["bandwidth_bytes_per_second"] / 1e9:,.0f} GB/s'
    )
  if 'parts_seconds' in numbers:
    parts = numbers['parts_seconds']
    whole = sum(parts.values())
    each = (f'{name} {seconds:.3f} s ({seconds / whole:.0%})' for name, seconds in parts.items())
    found.append(', '.join(each))
  if 'idle_share' in numbers:
    found.append(f'the device waits for the host {numbers["idle_share"]:.0%} of the time')
  found.append(f'memory, GB: {_memory(numbers["peak_bytes"])}')
  for part, speed in numbers.get('bytes_per_second', {}).items():
    found.append(f'{part}: {speed / 1e9:.2f} GB/s of {numbers["bytes"] / 1e6:,.0f} MB')
  if numbers['peer'] is not None:
    packages = numbers['peer']['loaded']['versions'].items()
    versions = ', '.join(f'{name} {version}' for name, version in packages)
    found.append(f'{numbers["peer"]["name"]} ({versions}), in turn with it:')
    for part, row in numbers['seconds'].items():
      ratio = row['ratio']
      found.append(
        f'  {_seconds(part, row["peer"])}: {ratio["median"]:.2f} times our time '
        f'({ratio["least"]:.2f} to {ratio["most"]:.2f})'
      )
  found += _operations(numbers.get('operations', []))
  others = numbers['others']
  if others is not None and others > DISTURBED:
    found.append(f'other processes used {others:.0%} of the cores: the numbers mean little')
  return found


def _memory(peak: dict[str, int | None]) -> str:
  """The most that the process held, and its device where that tells."""
  held = (f'{name} {size / 1e9:.2f}' for name, size in peak.items() if size is not None)
  return ', '.join(held)


def _operations(costliest: Sequence[dict[str, Any]]) -> Iterator[str]:
  """A profile's costliest operations, seconds a step."""
  if costliest:
    yield 'costliest operations, seconds a step (they may run beside each other):'
  for each in costliest:
    yield f'  {each["seconds"]:.4f}  {each["program"]} {each["name"]}'


def _seconds(part: str, row: dict[str, float]) -> str:
  return f'{part} {row["median"]:.3f} s ({row["least"]:.3f} to {row["most"]:.3f})'


def rows(numbers: dict[str, Any]) -> Iterator[str]:
  """The lines of a job, one for each of its parts."""
  peer, others = numbers['peer'], numbers['others']
  memory = [numbers['peak_bytes']['host'], None if peer is None else peer['peak_bytes']]
  held = ', '.join(f'{size / 1e9:.2f}' for size in memory if size is not None)
  for part, row in numbers['seconds'].items():
    if 'tokens_per_second' in numbers:
      speed = f'{numbers["tokens_per_second"]:,.0f} tokens/s'
    else:
      bytes_per_second = numbers.get('bytes_per_second', {}).get(part)
      speed = '' if bytes_per_second is None else f'{bytes_per_second / 1e9:.2f} GB/s'
    share = f'{numbers["utilisation"]:.0%}' if 'utilisation' in numbers else ''
    cells = [
      numbers['job'],
      part,
      _spread(row['ours'], 3),
      speed,
      share,
      _spread(row['peer'], 3) if peer else '',
      _spread(row['ratio'], 2) if peer else '',
      held,
      '' if others is None else f'{others:.0%}',
    ]
    yield f'| {" | ".join(cells)} |'


def behind(numbers: dict[str, Any]) -> str:
  """A job's line of what is behind our numbers."""

  def cell(name: str, text: str, scale: float = 1.0) -> str:
    return text.format(numbers[name] / scale) if name in numbers else ''

  peak = numbers['peak_bytes']
  cells = [
    numbers['job'],
    cell('ceiling_flops_per_second', '{:,.0f}', 1e9),
    cell('bandwidth_share', '{:.0%}'),
    cell('compile_seconds', '{:.1f}'),
    cell('idle_share', '{:.0%}'),
    ', '.join(f'{seconds:.3f}' for seconds in numbers.get('parts_seconds', {}).values()),
    ', '.join(f'{size / 1e9:.2f}' for size in peak.values() if size is not None),
  ]
  return f'| {" | ".join(cells)} |'


def _spread(row: dict[str, float], digits: int) -> str:
  median, least, most = (f'{row[name]:.{digits}f}' for name in ('median', 'least', 'most'))
  return f'{median} ({least} to {most})'


def table(measured: Sequence[dict[str, Any]]) -> str:
  """The tables of a size, and what they were measured on."""
  first = measured[0]
  where = [
    f'{first["processor"]}, {first["cores"]} cores',
    f'{first["device"]} with jax {first["jax"]}{_computing(measured)}',
    f'revision {", ".join(sorted({_short(numbers["revision"]) for numbers in measured}))}',
  ]
  versions: dict[str, list[str]] = {}
  for numbers in measured:
    loaded = {} if numbers['peer'] is None else numbers['peer']['loaded']['versions']
    for name, version in loaded.items():
      if version not in versions.setdefault(name, []):
        versions[name].append(version)
  where += [f'{name} {" and ".join(found)}' for name, found in versions.items()]
  lines = [line for numbers in measured for line in rows(numbers)]
  ours = [behind(numbers) for numbers in measured]
  title = next((numbers['peer']['name'] for numbers in measured if numbers['peer']), 'peer')
  head = [line.format(title) for line in HEAD]
  return '\n'.join([f'{"; ".join(where)}.', '', *head, *lines, '', *HEAD_OURS, *ours])


def _computing(measured: Sequence[dict[str, Any]]) -> str:
  """How many devices there were, and in what they computed, where that is not the usual."""
  devices, dtype = (measured[0][name] for name in ('devices', 'dtype'))
  several = f' on {devices} devices' if devices > 1 else ''
  return several + ('' if dtype == 'float32' else f' in {dtype}')


def _short(revision: str | None) -> str:
  """A git revision; '+' stays, which says that files differed from it."""
  whole = str(revision)
  return whole[:10] + ('+' if whole.endswith('+') else '')


def put(page: str, name: str, content: str) -> str:
  """The page with other content between the marks of a name; raises UserError if it has none."""
  marks = re.compile(rf'(<!-- {name} -->\n).*?(<!-- end -->)', re.DOTALL)
  if not marks.search(page):
    raise UserError(f'--out: expected a page with <!-- {name} --> and, below it, <!-- end -->.')
  return marks.sub(lambda found: f'{found[1]}{content}\n{found[2]}', page, count=1)
