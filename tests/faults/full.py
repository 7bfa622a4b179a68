"""All drills at full size, and their table for docs/reliability.md; hours on a small machine.

  python -m tests.faults.full --workdir=runs/drills

Fifty kills for each of SFT, DPO, PPO and a study, fifteen of them while a checkpoint is written,
and some of every other fault. The same command again goes on with what is not there yet.
"""

import json
import pathlib
import subprocess
import sys

from absl import app, flags

from rlhf_jax.runs import write_json

WORKDIR = flags.DEFINE_string('workdir', 'runs/drills', 'Where its runs are.')

HERE = pathlib.Path(__file__).parent
DOCUMENT = HERE.parents[1] / 'docs' / 'reliability.md'
BEGIN, END = '<!-- drills -->', '<!-- end of drills -->'
# (case, drill) -> trials
TRIALS = {
  **{(case, 'kill'): 35 for case in ('sft', 'dpo', 'ppo', 'compare')},
  **{(case, 'kill_saving'): 15 for case in ('sft', 'dpo', 'ppo', 'compare')},
  **{('ppo', drill): 10 for drill in ('terminate', 'interrupt_twice')},
  ('ppo', 'damage'): 20,
  **{('ppo', drill): 5 for drill in ('full', 'read_only', 'clock')},
  ('sft', 'process'): 5,
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


def write(lines: list[str]) -> None:
  """Puts the table into the document."""
  text = DOCUMENT.read_text(encoding='utf-8')
  before, _, rest = text.partition(BEGIN)
  after = rest.partition(END)[2]
  table = '\n'.join(lines)
  DOCUMENT.write_text(f'{before}{BEGIN}\n{table}\n{END}{after}', encoding='utf-8')


def main(argv: list[str]) -> None:
  del argv
  folder = pathlib.Path(WORKDIR.value)
  lines = [HEADER]
  for (case, drill), trials in TRIALS.items():
    outcome = result(case, drill, trials, folder)['outcome']
    counts = (outcome[name] for name in ('trials', 'survived', 'finished', 'equal'))
    lines.append(f'| {case} | {drill} | ' + ' | '.join(str(count) for count in counts) + ' |')
    write(lines)
  print('\n'.join(lines))


if __name__ == '__main__':
  app.run(main)
