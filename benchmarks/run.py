"""Times one job: tokens a second, seconds a step, and how much of the machine's ceiling that is.

  python -m benchmarks.run --job=dpo --size=SMALL
  python -m benchmarks.run --job=ppo_iteration --size=SMALL --repeats=9 --json=ppo.json

Jobs are stages like any other, on made-up text without padding, of a Llama-style decoder (SMALL
4.2M parameters, BASE 134M); a step is all that the training loop does for one: the batch, scoring
and rollouts, the update. Excluded are loading, and the first step, which compiles (its seconds are
stated). The ceiling is a plain product of large matrices, measured in the same process. Other work
on the machine makes every number meaningless: its load is stated too.
"""

import json
import pathlib
import sys
import tempfile

from absl import flags

from benchmarks import workloads
from benchmarks.timing import Timing, measure
from experiments import cli

JOB = flags.DEFINE_enum('job', None, list(workloads.JOBS), 'What is timed.', required=True)
SIZE = flags.DEFINE_enum('size', 'SMALL', list(workloads.SIZES), 'Of the decoder.')
DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of computation.')
REPEATS = flags.DEFINE_integer('repeats', 5, 'Steps that are timed, after the first.', 1)
FOLDER = flags.DEFINE_string(
  'folder', None, 'Keeps data and parents for the next time; default: a temporary one.'
)
JSON = flags.DEFINE_string('json', None, 'A file for the numbers.')


def main() -> int:
  out = cli.json_path(JSON.value)
  timing = Timing(JOB.value, SIZE.value, DTYPE.value, REPEATS.value)
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(FOLDER.value or temporary)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = measure(timing, folder)
  seconds = numbers['seconds']
  print(
    f'{numbers["job"]} {numbers["size"]}: {seconds["median"]:.3f} s a step '
    f'({seconds["least"]:.3f} to {seconds["most"]:.3f}), '
    f'{numbers["tokens_per_second"]:,.0f} tokens/s, {numbers["utilisation"]:.0%} of '
    f'{numbers["ceiling_flops_per_second"] / 1e9:,.0f} GFLOP/s; '
    f'first step {numbers["first_step_seconds"]:.1f} s; load before {numbers["load_before"]:.1f}'
  )
  if out is not None:
    out.write_text(json.dumps(numbers, indent=1) + '\n', encoding='utf-8')
  sys.stdout.flush()
  return cli.DONE


if __name__ == '__main__':
  cli.run(main)
