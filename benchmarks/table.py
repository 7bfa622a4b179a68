"""Times all jobs of a size, and writes their table into a page.

  python -m benchmarks.table --size=SMALL \
    --peer=trl --peer_python=.venv-trl/bin/python --ppo_python=.venv-trl-ppo/bin/python

Every job is a `benchmarks.run` of its own, whose numbers are kept in --folder; those that are there
already are not taken again, so that the same command goes on where it was stopped. Then the table
is written between the marks of its size, and of a peer other than TRL, in --out; what is around
them stays.
"""

import json
import pathlib
import subprocess
import sys

from absl import flags

from benchmarks import options, report, workloads
from benchmarks.timing import NAMES
from experiments import cli
from rlhf_jax.common.errors import UserError

JOBS = flags.DEFINE_list('jobs', list(NAMES), 'What is timed.')
PPO_PYTHON = flags.DEFINE_string(
  'ppo_python', None, 'The interpreter of another environment for the jobs of PPO.'
)
FOLDER = flags.DEFINE_string(
  'folder', 'runs/benchmarks', 'Keeps numbers, data and parents for the next time.'
)
OUT = flags.DEFINE_string('out', 'benchmarks/RESULTS.md', 'The page that has the table.')
flags.adopt_module_key_flags(options)


def python_of(job: str) -> str | None:
  """The peer's interpreter for a job, which has what that needs; None without a peer."""
  library, python = options.library(), options.PEER_PYTHON.value
  if library is None or python is None:
    return None
  if job.startswith('ppo') and PPO_PYTHON.value is not None:
    python = PPO_PYTHON.value
  library.check(python, job)
  return python


def command(job: str, target: pathlib.Path, python: str | None) -> list[str]:
  """The `benchmarks.run` of a job."""
  other = [] if python is None else [f'--peer={options.PEER.value}', f'--peer_python={python}']
  return [
    *(sys.executable, '-m', 'benchmarks.run', f'--job={job}', f'--size={options.SIZE.value}'),
    *(f'--dtype={options.dtype()}', f'--repeats={options.REPEATS.value}'),
    *(f'--folder={FOLDER.value}', f'--json={target}', *other),
  ]


def numbers_folder() -> pathlib.Path:
  """Where the numbers of a size are kept: those against each peer, and of each type, apart."""
  own = workloads.SIZES[options.SIZE.value].compute_dtype
  other = '' if options.dtype() == own else f'_{options.dtype()}'
  name = f'against_{options.PEER.value or "nobody"}{other}'
  return pathlib.Path(FOLDER.value) / options.SIZE.value / name


def main() -> int:
  library = options.library()
  unknown = sorted(set(JOBS.value) - set(NAMES))
  if unknown:
    raise UserError(f'--jobs={",".join(unknown)}: expected some of {", ".join(NAMES)}.')
  out, mark = pathlib.Path(OUT.value), options.SIZE.value
  if options.PEER.value not in (None, 'trl'):
    mark = f'{mark} against {options.PEER.value}'
  if not out.is_file():
    raise UserError(f'--out={out}: there is no such page.')
  report.put(out.read_text(encoding='utf-8'), mark, '')
  if said := options.skipped():
    print(said)
    return cli.DONE
  jobs = JOBS.value
  if library is not None and not flags.FLAGS['jobs'].present:
    jobs = [job for job in jobs if library.has(job)]
  pythons = {job: python_of(job) for job in jobs}
  kept = numbers_folder()
  kept.mkdir(parents=True, exist_ok=True)
  failed = []
  for job in jobs:
    target = kept / f'{job}.json'
    if (
      not target.exists()
      and subprocess.run(command(job, target, pythons[job]), check=False).returncode
    ):
      failed.append(job)
  files = [kept / f'{name}.json' for name in NAMES]
  measured = [json.loads(file.read_text(encoding='utf-8')) for file in files if file.exists()]
  if measured:
    page = report.put(out.read_text(encoding='utf-8'), mark, report.table(measured))
    out.write_text(page, encoding='utf-8')
  if failed:
    raise UserError(f'{", ".join(failed)}: failed; what they said is above.')
  return cli.DONE


if __name__ == '__main__':
  cli.run(main)
