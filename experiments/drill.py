"""Lets a stage or a study go through faults: the same command must end with the same bits.

  python -m experiments.drill --config=configs/dpo.py --workdir=runs/drill --trials=10
  python -m experiments.drill --config=configs/quickstart.py --drills=kill --workdir=runs/drill

The config is run undisturbed first. Then each drill runs it again and again, as experiments.train
or experiments.compare in a process of its own, and disturbs it: kill -9 at random moments, and
while a checkpoint is being written; signals; a damaged checkpoint; a full disk; a read-only
folder; a clock that jumps; one of two processes killed. Each time the same command must go on, and
every run's end is compared with the undisturbed one: parameters, metrics, samples, reports.

Any field can be set, as for experiments.train: take few steps and frequent checkpoints. The table
goes to the terminal and to drills.json in --workdir.

Exit codes: 0 all survived with equal bits, 1 something did not, or something given is wrong.
"""

import dataclasses
import pathlib
import sys
import time

from absl import flags

from experiments import cli
from experiments.drilling.drills import DRILLS, MOUNTING
from experiments.drilling.ground import BrokenError, Outcome, prepare
from experiments.drilling.program import Program
from experiments.drilling.storage import storage_faults
from rlhf_jax.common.errors import UserError
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.runs import write_json
from rlhf_jax.study import StudyConfig

CONFIG = cli.define_config('The stage or the study that is drilled.')
WORKDIR = flags.DEFINE_string('workdir', None, 'The folder of all its runs.', required=True)
TRIALS = flags.DEFINE_integer('trials', 5, 'How often each fault happens.', 1)
NAMES = flags.DEFINE_list('drills', None, f'Some of {", ".join(DRILLS)}; default: all.')
SEED = flags.DEFINE_integer('seed', 0, 'Draws the moments and the places of faults.')

COLUMNS = ('drill', 'trials', 'survived', 'runs', 'bits equal', 'seconds')


@dataclasses.dataclass(frozen=True)
class Row:
  """What became of one drill."""

  drill: str
  outcome: Outcome
  seconds: float
  broken: str | None = None

  @property
  def passed(self) -> bool:
    outcome = self.outcome
    return (
      self.broken is None
      and outcome.survived == outcome.trials
      and outcome.equal == outcome.finished
    )

  def cells(self) -> tuple[str, ...]:
    outcome = self.outcome
    counts = (outcome.trials, outcome.survived, outcome.finished, outcome.equal)
    return (self.drill, *(str(count) for count in counts), f'{self.seconds:.0f}')


def chosen() -> list[str]:
  """The drills to go through; raises UserError for those there are not, or not here."""
  names = list(DRILLS) if NAMES.value is None else NAMES.value
  if unknown := [name for name in names if name not in DRILLS]:
    raise UserError(f'--drills={",".join(unknown)}: expected some of {", ".join(DRILLS)}.')
  mounting = [name for name in names if name in MOUNTING]
  if mounting and not storage_faults():
    if NAMES.value is not None:
      raise UserError(
        f'--drills={",".join(mounting)}: this machine does not let you mount a file system of your '
        'own (`unshare -rm`). Leave them out.'
      )
    print(f'not here, as it needs `unshare -rm`: {", ".join(mounting)}', flush=True)
    names = [name for name in names if name not in mounting]
  return names


def program(folder: pathlib.Path) -> Program:
  """What is drilled, with the config as given; its stages are shared below `folder`."""
  config = cli.given(CONFIG)
  if not isinstance(config, ExperimentConfig | StudyConfig):
    raise UserError(f'--config: expected a stage or a study, got {type(config).__name__}.')
  given = tuple(text for text in sys.argv[1:] if text.startswith('--config'))
  cache = f'--cache_dir={flags.FLAGS.cache_dir}'
  if isinstance(config, StudyConfig):
    return Program('compare', (*given, cache))
  return Program('train', (*given, cache, f'--root={folder}'))


def table(rows: list[Row]) -> str:
  """The rows in Markdown."""
  lines = ['| ' + ' | '.join(COLUMNS) + ' |', '| :-- |' + ' --: |' * (len(COLUMNS) - 1)]
  lines += ['| ' + ' | '.join(row.cells()) + ' |' for row in rows]
  return '\n'.join(lines)


def main() -> int:
  names = chosen()
  folder = pathlib.Path(WORKDIR.value).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  ground = prepare(program(folder), folder, SEED.value)
  rows = []
  for name in names:
    began, broken, outcome = time.monotonic(), None, Outcome()
    try:
      DRILLS[name](ground, TRIALS.value, outcome)
    except (BrokenError, TimeoutError) as error:
      broken = str(error)
    row = Row(name, outcome, time.monotonic() - began, broken)
    rows.append(row)
    print(
      f'{name}: {outcome.trials} trials, {outcome.equal} of {outcome.finished} runs equal, '
      f'{row.seconds:.0f} s',
      flush=True,
    )
    for note in [*outcome.notes, *([f'BROKEN: {broken}'] if broken else [])]:
      print(f'  {note}', flush=True)
    write_json(folder / 'drills.json', [dataclasses.asdict(row) for row in rows])
  print(table(rows))
  return cli.DONE if all(row.passed for row in rows) else cli.USER_ERROR


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  cli.run(main)
