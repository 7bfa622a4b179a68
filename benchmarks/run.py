"""Times one job: seconds a step, tokens a second, and how much of the machine's limits that is.

  python -m benchmarks.run --job=dpo --size=SMALL
  python -m benchmarks.run --job=ppo_iteration --size=SMALL --repeats=9 --json=ppo.json
  python -m benchmarks.run --job=dpo --peer=trl --peer_python=.venv-trl/bin/python
  python -m benchmarks.run --job=dpo --profile=runs/trace

With --peer another library, TRL or Tunix, does the same job in a process of its own: our step, its
step, our step, ... With --profile the trace of a few steps is kept, and their costliest operations
are printed. The jobs, what is excluded and how to read the numbers: benchmarks/README.md.
"""

import functools
import json
import pathlib
import sys
import tempfile

from absl import flags

from benchmarks import options, report, workloads
from benchmarks.timing import NAMES, Timing, measure
from experiments import cli
from rlhf_jax.common.errors import UserError

JOB = flags.DEFINE_enum('job', None, list(NAMES), 'What is timed.', required=True)
FOLDER = flags.DEFINE_string(
  'folder', None, 'Keeps data and parents for the next time; default: a temporary one.'
)
JSON = flags.DEFINE_string('json', None, 'A file for the numbers.')
PROFILE = flags.DEFINE_string(
  'profile', None, 'A folder for the trace of a few steps, as jax.profiler writes it.'
)
flags.adopt_module_key_flags(options)


def main() -> int:
  out = cli.json_path(JSON.value)
  library, python = options.library(), options.PEER_PYTHON.value
  traces = None if PROFILE.value is None else pathlib.Path(PROFILE.value)
  if traces is not None and JOB.value not in workloads.JOBS:
    raise UserError(
      f'--profile={traces}: expected none with --job={JOB.value}, which has no steps of one stage; '
      f'{", ".join(workloads.JOBS)} have.'
    )
  if said := options.skipped():
    print(said)
    return cli.DONE
  if traces is not None:
    traces.mkdir(parents=True, exist_ok=True)
  start = None
  if library is not None and python is not None:
    library.check(python, JOB.value)
    start = functools.partial(library.start, python)
  timing = Timing(JOB.value, options.SIZE.value, options.dtype(), options.REPEATS.value)
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(FOLDER.value or temporary)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = measure(timing, folder, start, traces)
  print('\n'.join(report.lines(numbers)))
  if out is not None:
    out.write_text(json.dumps(numbers, indent=1) + '\n', encoding='utf-8')
  sys.stdout.flush()
  return cli.DONE


if __name__ == '__main__':
  cli.run(main)
