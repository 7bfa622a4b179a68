"""Makes a step of a run again that went wrong, and says where: what is not finite, or is a spike.

  python -m experiments.replay --run=runs/dpo
  python -m experiments.replay --run=runs/dpo --step=412 --json=step_412.json

A run that stops at a loss, gradient or reward that is not finite, or at a spike of its gradient
norm (or skips one of them, the first time) keeps the step in nonfinite/: what the update learnt
from, the samples and rewards that this was made from, and its metrics. Runs are the same bit for
bit every time, so the state before the step is made again from the last checkpoint before it, or
from the beginning: it takes as long as that took then. Then the step itself is made, first as the
run made it, which is compared with what was kept, and then update by update, gradient by gradient,
row by row.

It says: whether the step came out as it did then; which parameters were not finite before it, and
how large they were; which rewards of which samples; which leaf of the batch, in which rows; which
of the step's updates is the first to go wrong, its loss, gradients and the rows at fault; how far
the policy was from the one that sampled and from the reference. Rows are shown with their texts.

--debug stops at the operation that makes the first nan instead, with a traceback.

Use the same versions, devices and mesh as the run did, in one process. Nothing of the run is
changed, except that a damaged checkpoint is set aside, as whenever one is read.

--json writes {"schema": 1, "run", "step", "checkpoint" (the step it was made from, or null),
"reproduced": "bits", "rounding" or "no", "differing": [names], "metrics": {...},
"not_finite": {"parameters", "optimizer", "carry", "gradients": {name: how many numbers},
"batch", "rewards": {name: [rows]}}, "largest_parameter": {role: ...},
"update", "updates" (which of how many, from 0), "found" (whether a loss or gradient is not finite
again), "spike" (its gradient norm over the median of those before it; 0 if it is none),
"rows": [{"row", "loss", "gradient_norm", "texts"}] (of that update; loss and gradient norm of each
row alone, null where it has none), "samples": [{"row", "texts"}] (those with bad rewards),
"log_ratios": {name: {"largest", "row"}}, "explanation": [sentences]}.
Numbers that are not finite are written as "nan", "inf", "-inf".

Exit codes: 0 done, whatever was found; 1 something given is wrong, or there is no such step; 130
ended by Ctrl-C.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags

from experiments import cli
from rlhf_jax import reading, stages
from rlhf_jax.common.errors import RunError
from rlhf_jax.objectives import objective_of
from rlhf_jax.provenance import environment_record
from rlhf_jax.recipes.replay import Replay, replay, rows_of
from rlhf_jax.recipes.rewards import reward_fingerprints
from rlhf_jax.runs import Run, write_json
from rlhf_jax.training import dumps

RUN = flags.DEFINE_string('run', None, 'The run directory.', required=True)
STEP = flags.DEFINE_integer('step', None, 'Which step; default: the last that was kept.', 1)
JSON = flags.DEFINE_string('json', None, 'A file to write what was found to.')

# Rows that are printed; --json has them all.
_SHOWN = 5


def main() -> int:
  path = cli.json_path(JSON.value)
  run = Run(RUN.value)
  dump = read(run)
  # What nobody here may write to, such as another's run, needs no lock, and has no room for one.
  writable = os.access(run.folder.parent, os.W_OK)
  with stages.locked(run.folder) if writable else contextlib.nullcontext():
    check(run)
    found = replay(run, dump, load_data(run))
  sentences = list(explain(found))
  for sentence in sentences:
    print(sentence)
  samples = wrong_samples(found)
  for row in samples[:_SHOWN]:
    show(f'sample {row}', found.sampled(row))
  # Where samples are compared, one bad reward spoils every row: those say nothing more.
  for row in [] if samples else wrong_rows(found)[:_SHOWN]:
    show(f'row {row}', found.texts(row))
  if path is not None:
    write_json(path, to_json(run, found, sentences))
    print(f'written to {path}')
  return cli.DONE


def read(run: Run) -> dumps.Dump:
  """The step that is asked for; raises RunError where there is none."""
  kept = dumps.steps(run.folder)
  steps = run.config.steps  # a directory that is no run has its own message
  if not kept:
    raise RunError(
      f'{run.folder}: no step was kept (there is no {dumps.FOLDER}/): of its {steps} steps, none '
      'that was made was stopped at or skipped for what health.* watches.'
    )
  step = kept[-1] if STEP.value is None else STEP.value
  if step not in kept:
    raise RunError(
      f'--step={step}: {run.folder} has kept {"step" if len(kept) == 1 else "steps"} '
      f'{", ".join(map(str, kept))}.'
    )
  return dumps.load(run.folder, step)


def check(run: Run) -> None:
  """Says what is not as it was; raises RunError where the rewards are others."""
  config = run.config
  if objective_of(config.objective).data == 'prompts':
    was = run.reward_fingerprints
    for name, sha in reward_fingerprints(config.rollout).items():
      if was.get(name) != sha:
        raise RunError(f'{run.folder}: {name} is not as it was when it paid the run. Restore it.')
  then, now = run.record, environment_record()
  for name in ('packages', 'git_revision', 'backend', 'devices', 'processes'):
    if then.get(name) != now[name]:
      print(f'note: {name} then {then.get(name)}, now {now[name]}: numbers may differ')


def load_data(run: Run) -> Any:
  """The records of the run; raises RunError for others."""
  feedback = reading.load_data(run.config.data, run.folder.parent)
  if feedback.fingerprint != run.data_fingerprint:
    raise RunError(f'{run.folder}: {feedback.source} holds other records than the run learnt from.')
  return feedback


def explain(found: Replay) -> Iterator[str]:
  """What there is to say, what comes first in a step first."""
  since = 'the beginning' if found.checkpoint is None else f'checkpoint {found.checkpoint}'
  same = 'bit for bit what it was'
  if found.differing:
    same = 'what it was, up to rounding' if found.close else 'NOT what it was'
  yield f'step {found.step}, made again from {since}: {same}.'
  if found.differing:
    more = f' and {len(found.differing) - _SHOWN} more' if len(found.differing) > _SHOWN else ''
    yield f'  differing: {", ".join(found.differing[:_SHOWN])}{more}.'
  yield from _before(found)
  for name, scores in found.now.rewards.items():
    if rows := rows_of(scores):
      yield f'reward {name}: {scores[rows[0]]} in {_rows(rows)} of {len(scores)} samples.'
  for name, array in found.now.batch.items():
    if rows := rows_of(array):
      yield f'batch {name}: not finite in {_rows(rows)} of {len(array)}.'
  yield from _update(found)
  for name, (largest, row) in found.ratios.items():
    yield f'largest |log-ratio| of a token to {name}: {largest:.4g}, in row {row}.'


def _before(found: Replay) -> Iterator[str]:
  """What is said of the state before the step."""
  for what, counts in (
    ('parameters', found.parameters),
    ('optimizer state', found.optimizer),
    ('carry', found.carry),
  ):
    if counts:
      first = next(iter(counts))
      others = f' and {len(counts) - 1} others' if len(counts) > 1 else ''
      yield (
        f'{what}: {counts[first]} numbers of {first}{others} were not finite before the step: an '
        'earlier update made them so.'
      )
  for role, largest in found.largest.items():
    yield f'parameters {role}: the largest magnitude before the step is {largest:.4g}.'


def _update(found: Replay) -> Iterator[str]:
  """What is said of the update that goes wrong."""
  examined = found.examined
  loss, norm = (examined.values[name] for name in ('loss', 'gradient_norm'))
  place = f'update {examined.update + 1} of {examined.updates}'
  if not examined.found:
    yield f'all {examined.updates} updates: loss and gradients are finite.'
    if not examined.spike:
      yield f'{place}: loss {loss:.6g}, gradient norm {norm:.6g}.'
      return
    yield (
      f'{place}: its gradient norm {norm:.6g} is {examined.spike:.4g} times the median of those '
      f'before it; loss {loss:.6g}, of {_rows(examined.rows.tolist())}.'
    )
    if examined.norms is not None:
      largest = np.argsort(-examined.norms, kind='stable')[:_SHOWN]
      norms = ', '.join(f'{examined.norms[x]:.4g} (row {examined.rows[x]})' for x in largest)
      yield f'{place}: the largest gradient norms of rows alone: {norms}.'
    return
  yield f'{place}: loss {loss:.6g}, gradient norm {norm:.6g}, of {_rows(examined.rows.tolist())}.'
  others = [
    name
    for name, value in examined.values.items()
    if not np.isfinite(value) and name not in ('loss', 'gradient_norm')
  ]
  if others:
    yield f'{place}: metrics that are not finite: {", ".join(others)}.'
  if examined.gradients:
    first = next(iter(examined.gradients))
    yield (
      f'{place}: {len(examined.gradients)} gradients are not finite, first that of {first} '
      f'({examined.gradients[first]} numbers).'
    )
  if examined.losses is None:
    yield f'{place}: rows are compared with each other and have no loss of their own.'
    return
  wrong = wrong_rows(found)
  if len(wrong) == len(examined.rows) > 1:
    yield f'{place}: every row alone has a loss or gradient that is not finite.'
  elif wrong:
    yield f'{place}: alone, {_rows(wrong)} have a loss or gradient that is not finite.'
  else:
    yield f'{place}: every row alone is finite; their sum is not.'


def wrong_rows(found: Replay) -> list[int]:
  """The rows of the batch at fault: those that go wrong alone, else those with bad numbers.

  Of a spike the row with the largest gradient.
  """
  examined = found.examined
  if examined.spike and examined.norms is not None:
    return [int(examined.rows[np.argmax(examined.norms)])]
  if examined.losses is not None and examined.norms is not None:
    bad = ~(np.isfinite(examined.losses) & np.isfinite(examined.norms))
    if bad.any():
      return examined.rows[bad].tolist()
  named = {row for array in found.now.batch.values() for row in rows_of(array)}
  return sorted(named)


def wrong_samples(found: Replay) -> list[int]:
  """The rows of the samples with a reward that is not finite."""
  return sorted({row for scores in found.now.rewards.values() for row in rows_of(scores)})


def show(title: str, texts: list[str]) -> None:
  """Prints a prompt and its responses; nothing where there are no texts."""
  if texts:
    print(f'{title}\n  prompt:   {texts[0]!r:.300}')
    for response in texts[1:]:
      print(f'  response: {response!r:.300}')


def _rows(rows: list[int]) -> str:
  shown = ', '.join(map(str, rows[: 2 * _SHOWN]))
  more = f' and {len(rows) - 2 * _SHOWN} more' if len(rows) > 2 * _SHOWN else ''
  return f'{"row" if len(rows) == 1 else "rows"} {shown}{more}'


def to_json(run: Run, found: Replay, sentences: list[str]) -> dict[str, Any]:
  """What --json writes; the schema is in the program's description."""
  examined = found.examined
  of_row = {
    int(row): tuple(
      None if numbers is None else _plain(numbers[place])
      for numbers in (examined.losses, examined.norms)
    )
    for place, row in enumerate(examined.rows)
  }
  return {
    'schema': 1,
    'run': str(run.folder),
    'step': found.step,
    'checkpoint': found.checkpoint,
    'reproduced': 'bits' if not found.differing else 'rounding' if found.close else 'no',
    'differing': found.differing,
    'metrics': {name: _plain(value) for name, value in found.now.values.items()},
    'not_finite': {
      'parameters': found.parameters,
      'optimizer': found.optimizer,
      'carry': found.carry,
      'gradients': examined.gradients,
      'batch': {name: rows for name, x in found.now.batch.items() if (rows := rows_of(x))},
      'rewards': {name: rows for name, x in found.now.rewards.items() if (rows := rows_of(x))},
    },
    'largest_parameter': {role: _plain(value) for role, value in found.largest.items()},
    'update': examined.update,
    'updates': examined.updates,
    'found': examined.found,
    'spike': examined.spike,
    'rows': [
      {'row': row, 'loss': loss, 'gradient_norm': norm, 'texts': found.texts(row)}
      for row, (loss, norm) in sorted(of_row.items())
    ],
    'samples': [{'row': row, 'texts': found.sampled(row)} for row in wrong_samples(found)],
    'log_ratios': {
      name: {'largest': _plain(ratios.largest), 'row': ratios.row}
      for name, ratios in found.ratios.items()
    },
    'explanation': sentences,
  }


def _plain(value: Any) -> float | str:
  """A number, or the name of one that JSON lacks."""
  return float(value) if np.isfinite(value) else str(float(value))


if __name__ == '__main__':
  cli.run(main)
