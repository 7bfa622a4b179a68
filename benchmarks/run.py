"""Times one job: seconds a step, tokens a second, and how much of the machine's ceiling that is.

  python -m benchmarks.run --job=dpo --size=SMALL
  python -m benchmarks.run --job=ppo_iteration --size=SMALL --repeats=9 --json=ppo.json
  python -m benchmarks.run --job=dpo --peer=trl --peer_python=.venv-trl/bin/python

With --peer TRL does the same job in a process of its own: our step, its step, our step, ... The
jobs, what is excluded and how to read the numbers: benchmarks/README.md.
"""

import json
import pathlib
import sys
import tempfile

from absl import flags

from benchmarks import options, peer, report
from benchmarks.timing import NAMES, Timing, measure
from experiments import cli

JOB = flags.DEFINE_enum('job', None, list(NAMES), 'What is timed.', required=True)
DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of computation.')
FOLDER = flags.DEFINE_string(
  'folder', None, 'Keeps data and parents for the next time; default: a temporary one.'
)
JSON = flags.DEFINE_string('json', None, 'A file for the numbers.')
flags.adopt_module_key_flags(options)


def main() -> int:
  out = cli.json_path(JSON.value)
  python = options.PEER_PYTHON.value
  options.check_peer(DTYPE.value)
  if python is not None:
    peer.check(python, JOB.value)
  timing = Timing(JOB.value, options.SIZE.value, DTYPE.value, options.REPEATS.value)
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(FOLDER.value or temporary)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = measure(timing, folder, python)
  print('\n'.join(report.lines(numbers)))
  if out is not None:
    out.write_text(json.dumps(numbers, indent=1) + '\n', encoding='utf-8')
  sys.stdout.flush()
  return cli.DONE


if __name__ == '__main__':
  cli.run(main)
