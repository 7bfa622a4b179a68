"""Numbers of jobs as people read them: lines of a program, and rows of a table."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.measuring import DISTURBED
from rlhf_jax.common.errors import UserError

HEAD = (
  '| Job | Part | Ours, s | Our speed | Of the ceiling | TRL, s | TRL / ours | '
  'Memory, GB: ours, TRL | Others |',
  '| :-- | :-- | --: | --: | --: | --: | --: | --: | --: |',
)


def lines(numbers: dict[str, Any]) -> list[str]:
  """What is printed of a job's numbers."""
  name = f'{numbers["job"]} {numbers["size"]}'
  found = [
    f'{name}: {", ".join(_seconds(part, row["ours"]) for part, row in numbers["seconds"].items())}'
  ]
  if 'utilisation' in numbers:
    found.append(
      f'{numbers["tokens_per_second"]:,.0f} tokens/s, {numbers["utilisation"]:.0%} of '
      f'{numbers["ceiling_flops_per_second"] / 1e9:,.0f} GFLOP/s; first step '
      f'{numbers["first_seconds"]["step"]:.1f} s, {numbers["compile_seconds"]:.1f} s of compiling'
    )
  if 'idle_share' in numbers:
    found.append(f'the device waits for the host {numbers["idle_share"]:.0%} of the time')
  for part, speed in numbers.get('bytes_per_second', {}).items():
    found.append(f'{part}: {speed / 1e9:.2f} GB/s of {numbers["bytes"] / 1e6:,.0f} MB')
  if numbers['peer'] is not None:
    packages = numbers['peer']['loaded']['versions']
    found.append(f'trl {packages["trl"]}, torch {packages["torch"]}, in turn with it:')
    for part, row in numbers['seconds'].items():
      ratio = row['ratio']
      found.append(
        f'  {_seconds(part, row["peer"])}: {ratio["median"]:.2f} times our time '
        f'({ratio["least"]:.2f} to {ratio["most"]:.2f})'
      )
  others = numbers['others']
  if others is not None and others > DISTURBED:
    found.append(f'other processes used {others:.0%} of the cores: the numbers mean little')
  return found


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


def _spread(row: dict[str, float], digits: int) -> str:
  median, least, most = (f'{row[name]:.{digits}f}' for name in ('median', 'least', 'most'))
  return f'{median} ({least} to {most})'


def table(measured: Sequence[dict[str, Any]]) -> str:
  """The table of a size, and what it was measured on."""
  first = measured[0]
  where = [
    f'{first["processor"]}, {first["cores"]} cores',
    f'{first["device"]} with jax {first["jax"]}',
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
  return '\n'.join([f'{"; ".join(where)}.', '', *HEAD, *lines])


def _short(revision: str | None) -> str:
  """A git revision; '+' stays, which says that files differed from it."""
  whole = str(revision)
  return whole[:10] + ('+' if whole.endswith('+') else '')


def put(page: str, size: str, content: str) -> str:
  """The page with other content between the marks of a size; raises UserError if it has none."""
  marks = re.compile(rf'(<!-- {size} -->\n).*?(<!-- end -->)', re.DOTALL)
  if not marks.search(page):
    raise UserError(f'--out: expected a page with <!-- {size} --> and, below it, <!-- end -->.')
  return marks.sub(lambda found: f'{found[1]}{content}\n{found[2]}', page, count=1)
