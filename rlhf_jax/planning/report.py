"""A plan as text, with what the numbers mean on named accelerators."""

from collections.abc import Iterable, Iterator, Mapping

from rlhf_jax.planning.accelerators import ACCELERATORS, Accelerator, accelerator
from rlhf_jax.planning.plan import USABLE, Plan
from rlhf_jax.planning.programs import CompiledProgram

_ARRAYS = 4  # largest arrays shown of each program


def lines(plan: Plan, chosen: str | None) -> Iterator[str]:
  """The report; `chosen` names an accelerator, None: all of the table are judged."""
  mesh = ' x '.join(f'{name} {size}' for name, size in plan.mesh.items())
  yield f'{plan.name} on {plan.devices} devices: {mesh}'
  yield from _memory(plan)
  yield from _operations(plan)
  yield from _traffic(plan)
  yield from _arrays(plan)
  yield from _verdicts(plan, chosen)
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


def _memory(plan: Plan) -> Iterator[str]:
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
  for role, each in plan.activations.items():
    kinds = {'saved': each.saved, 'one layer': each.working, 'read-out': each.readout}
    split = ', '.join(f'{name} {binary(size)}' for name, size in kinds.items())
    parts.append((f'activations of {role}', binary(each.total), f'estimate: {split}'))
  for role, size in plan.reading.items():
    parts.append((f'reading by {role}', binary(size), 'estimate: one layer, and logits'))
  yield from _table(parts)
  yield 'peak of a device:'
  yield from _table(
    [
      ('as compiled here, for CPUs', binary(plan.compiled_peak)),
      ('estimated for an accelerator', binary(plan.estimated_peak)),
    ]
  )


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


def _verdicts(plan: Plan, chosen: str | None) -> Iterator[str]:
  yield ''
  for name in [chosen] if chosen is not None else ACCELERATORS:
    found = accelerator(name)
    memory = USABLE * found.memory
    peaks = {'as compiled': plan.compiled_peak, 'as estimated': plan.estimated_peak}
    fitting = [kind for kind, peak in peaks.items() if peak <= memory]
    verdict = 'fits' if len(fitting) == 2 else f'fits {fitting[0]}' if fitting else 'does not fit'
    yield f'{name}: {verdict} ({binary(memory)} usable of {binary(found.memory)}; {found.source})'
    if chosen is not None:
      yield from _seconds(plan, found)


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
