"""All drills at full size, and their table for docs/reliability.md; hours on a small machine.

  python -m tests.faults.full --workdir=runs/drills

Fifty kills for each of SFT, DPO, PPO and a study, fifteen of them while a checkpoint is written,
and some of every other fault. The same command again goes on with what is not there yet.
--only=ppo/process,dpo/damage goes through these alone, and leaves the table's other rows as they
are.
"""

import json
import pathlib
import subprocess
import sys

from absl import app, flags

from rlhf_jax.runs import write_json

WORKDIR = flags.DEFINE_string('workdir', 'runs/drills', 'Where its runs are.')
ONLY = flags.DEFINE_list('only', None, 'CASE/DRILL, several with commas; default: all.')

HERE = pathlib.Path(__file__).parent
DOCUMENT = HERE.parents[1] / 'docs' / 'reliability.md'
BEGIN, END = '<!-- drills -->', '<!-- end of drills -->'
# (case, drill) -> trials
TRIALS = {
  **{(case, 'kill'): 35 for case in ('sft', 'dpo', 'ppo', 'compare')},
  **{(case, 'kill_saving'): 15 for case in ('sft', 'dpo', 'ppo', 'compare')},
  **{('ppo', drill): 10 for drill in ('terminate', 'interrupt_twice')},
  ('compare', 'terminate'): 5,
  ('ppo', 'damage'): 20,
  ('dpo', 'damage'): 10,
  **{('ppo', drill): 5 for drill in ('full', 'read_only', 'clock')},
  **{(case, 'process'): 5 for case in ('sft', 'ppo')},
}
# Of a single stage: long enough for faults to find it at work.
STAGE = ('--config.steps=150', '--config.checkpoint.every=10')
HEADER = """| Run | Drill | Trials | Survived | Runs led to their end | Bits equal |
| :-- | :-- | --: | --: | --: | --: |"""


def result(case: str, drill: str, trials: int, folder: pathlib.Path) -> dict:
  """What a drill came to, from an earlier time if it went well then."""
  workdir = folder / f'{case}_{drill}'
  path = workdir / 'result_of_drill.json'
  if path.exists():
    return json.loads(path.read_text())
  (workdir / 'drills.json').unlink(missing_ok=True)
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'experiments.drill', f'--config={HERE / "stages.py"}:{case}'),
      *(f'--drills={drill}', f'--trials={trials}', f'--workdir={workdir}'),
      *(() if case == 'compare' else STAGE),
    ]
  )
  if not (workdir / 'drills.json').exists():
    sys.exit(f'{case} {drill}: it could not begin; what it said is above')
  (row,) = json.loads((workdir / 'drills.json').read_text())
  if done.returncode == 0:
    write_json(path, row)
  return row


def row_of(case: str, drill: str) -> str:
  """How the table's row of a drill begins."""
  return f'| {case} | {drill} | '


def write(row: str) -> None:
  """Puts a row into the document's table, in the place of the one of the same drill."""
  text = DOCUMENT.read_text(encoding='utf-8')
  before, _, rest = text.partition(BEGIN)
  table, _, after = rest.partition(END)
  rows = [*table.splitlines(), row]
  found = [
    next(line for line in reversed(rows) if line.startswith(row_of(*key)))
    for key in TRIALS
    if any(line.startswith(row_of(*key)) for line in rows)
  ]
  table = '\n'.join([HEADER, *found])
  DOCUMENT.write_text(f'{before}{BEGIN}\n{table}\n{END}{after}', encoding='utf-8')


def main(argv: list[str]) -> None:
  del argv
  folder = pathlib.Path(WORKDIR.value)
  names = {'/'.join(key): key for key in TRIALS}
  if unknown := [name for name in ONLY.value or () if name not in names]:
    sys.exit(f'--only={",".join(unknown)}: expected some of {", ".join(names)}')
  for case, drill in map(names.__getitem__, ONLY.value or names):
    outcome = result(case, drill, TRIALS[case, drill], folder)['outcome']
    counts = (outcome[name] for name in ('trials', 'survived', 'finished', 'equal'))
    row = row_of(case, drill) + ' | '.join(str(count) for count in counts) + ' |'
    print(row, flush=True)
    write(row)


if __name__ == '__main__':
  app.run(main)
