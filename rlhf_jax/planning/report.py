"""A plan as text, with what the numbers mean on named accelerators."""

from collections.abc import Iterable, Iterator, Mapping

from rlhf_jax.planning.accelerators import Accelerator, judged
from rlhf_jax.planning.plan import USABLE, Plan
from rlhf_jax.planning.programs import CompiledProgram

_ARRAYS = 4  # largest arrays shown of each program


def lines(plan: Plan, chosen: str | None) -> Iterator[str]:
  """The report; `chosen` names an accelerator, None: all of the table are judged.

  Raises UserError for a name that the table lacks.
  """
  accelerators = judged(chosen)
  mesh = ' x '.join(f'{name} {size}' for name, size in plan.mesh.items())
  yield f'{plan.name} on {plan.devices} devices: {mesh}'
  yield from _memory(plan, accelerators)
  yield from _operations(plan)
  yield from _traffic(plan)
  yield from _arrays(plan)
  yield from _verdicts(plan, accelerators)
  for found in accelerators.values() if chosen is not None else ():
    yield from _seconds(plan, found)
  yield ''
  yield from (f'note: {note}' for note in plan.notes)


def binary(size: float) -> str:
  """Bytes for people, in powers of 1024."""
  for unit in ('B', 'KiB', 'MiB', 'GiB'):
    if abs(size) < 1024:
      return f'{size:.0f} {unit}' if unit == 'B' else f'{size:.2f} {unit}'
    size /= 1024
  return f'{size:.2f} TiB'


def _table(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
  """Words to the left of their columns, numbers to the right."""
  rows = list(rows)
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for row in rows:
    cells = (
      f'{cell:>{width}}' if cell[:1].isdigit() else f'{cell:<{width}}'
      for cell, width in zip(row, widths, strict=True)
    )
    yield f'  {"  ".join(cells)}'.rstrip()


def _memory(plan: Plan, accelerators: Iterable[str]) -> Iterator[str]:
  yield ''
  yield 'memory of a device, resident:'
  count = {**plan.parameters, **{f'{role} (frozen)': n for role, n in plan.parameters.items()}}
  yield from _table(
    (role, binary(size), f'{count[role] / 1e9:.3f}B parameters' if role in count else '')
    for role, size in plan.resident.items()
  )
  yield from _table([('together', binary(plan.held))])
  yield 'memory of a device, while a program runs:'
  evaluations = {f'evaluation, {name}': p for name, p in plan.evaluations.items()}
  yield from _table(
    (name, 'temporaries', binary(p.temporary), 'inputs and results', binary(p.extra))
    for name, p in {**plan.programs, **evaluations}.items()
  )
  yield 'of these:'
  parts = [('gradients', binary(plan.gradients), 'float32')]
  if plan.cache:
    parts.append(('weights to sample with', binary(plan.sampling_weights), 'compute type'))
    parts.append(('key-value cache', binary(plan.cache), 'while responses are sampled'))
  peaks = [('as compiled here, for CPUs', binary(plan.compiled_peak))]
  groups = _alike(plan, accelerators)
  for names in groups:
    where = f' on {", ".join(names)}' if len(groups) > 1 else ''
    found = plan.estimates[names[0]]
    for role, each in found.activations.items():
      kinds = {'saved': each.saved, 'one layer': each.working, 'read-out': each.readout}
      split = ', '.join(f'{name} {binary(size)}' for name, size in kinds.items())
      parts.append((f'activations of {role}', binary(each.total), f'estimate{where}: {split}'))
    for role, size in found.reading.items():
      parts.append((f'reading by {role}', binary(size), f'estimate{where}: one layer, and logits'))
    peak = binary(plan.estimated_peak(names[0]))
    peaks.append((f'estimated{where or " for an accelerator"}', peak))
  yield from _table(parts)
  yield 'peak of a device:'
  yield from _table(peaks)


def _alike(plan: Plan, accelerators: Iterable[str]) -> list[list[str]]:
  """Accelerators by what is estimated for them."""
  groups: list[list[str]] = []
  for name in accelerators:
    own = plan.estimates[name]
    for group in groups:
      other = plan.estimates[group[0]]
      if (own.activations, own.reading) == (other.activations, other.reading):
        group.append(name)
        break
    else:
      groups.append([name])
  return groups


def _operations(plan: Plan) -> Iterator[str]:
  yield ''
  yield 'operations of a step, all devices together, by arithmetic:'
  rows = [
    (name, role, f'{flops:.3e}')
    for name, by_role in plan.flops.items()
    for role, flops in by_role.items()
  ]
  rows.append(('together', '', f'{sum_of(plan.flops):.3e}'))
  yield from _table(rows)
  yield "operations of a device by XLA's count, which has a loop's body once:"
  yield from _table((name, f'{p.flops:.3e}') for name, p in plan.programs.items())


def sum_of(flops: Mapping[str, Mapping[str, float]]) -> float:
  """All operations of a step."""
  return sum(sum(by_role.values()) for by_role in flops.values())


def _traffic(plan: Plan) -> Iterator[str]:
  yield ''
  yield 'bytes that a device sends in a step:'
  rows = []
  for name, program in plan.programs.items():
    totals: dict[tuple[str, str], tuple[int, float]] = {}
    for each in program.read.collectives:
      times, total = totals.get((each.kind, each.axes), (0, 0.0))
      totals[each.kind, each.axes] = (times + each.times, total + each.total)
    for (kind, axes), (times, total) in sorted(totals.items(), key=lambda item: -item[1][1]):
      if total:
        rows.append((name, kind, f'over {axes}', f'{times} times', binary(total)))
  yield from _table(rows or [('none', '', '', '', '')])


def _arrays(plan: Plan) -> Iterator[str]:
  yield ''
  yield 'largest arrays that the programs make, on one device:'
  for name, program in plan.programs.items():
    yield from _table(
      (name, array.text, binary(array.bytes), array.origin.replace('jit(run)/', '')[-90:])
      for array in program.read.arrays[:_ARRAYS]
    )


def _verdicts(plan: Plan, accelerators: Mapping[str, Accelerator]) -> Iterator[str]:
  yield ''
  for name, found in accelerators.items():
    estimate, memory = plan.estimates[name], USABLE * found.memory
    if estimate.objection is not None:
      yield f'{name}: training would refuse it. {estimate.objection}'
      continue
    peaks = {'as compiled': plan.compiled_peak, 'as estimated': plan.estimated_peak(name)}
    fitting = [kind for kind, peak in peaks.items() if peak <= memory]
    verdict = 'fits' if len(fitting) == 2 else f'fits {fitting[0]}' if fitting else 'does not fit'
    kinds = ' and '.join(dict.fromkeys(estimate.attention.values()))
    yield (
      f'{name}: {verdict}, with {kinds} attention ({binary(memory)} usable of '
      f'{binary(found.memory)}; {found.source})'
    )


def _seconds(plan: Plan, found: Accelerator) -> Iterator[str]:
  yield 'seconds of a step at the least, each resource at its peak:'
  rows = [('', 'operations', 'links')]
  for name, program in plan.programs.items():
    flops = sum(plan.flops.get(name, {}).values())
    rows.append(
      (name, f'{flops / plan.devices / found.flops:.2f}', f'{_sent(program) / found.link:.2f}')
    )
  yield from _table(rows)
  if plan.decoded:
    seconds = plan.decoded / found.bandwidth
    yield f'  generation reads {binary(plan.decoded)} of weights and cache: {seconds:.2f}'


def _sent(program: CompiledProgram) -> float:
  return sum(each.total for each in program.read.collectives)
