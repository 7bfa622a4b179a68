"""Another program that does a job's steps in its own process, each when it is told to.

It says what it has to say in lines of JSON on its output, one when it is loaded and one after every
step, and does a step for every line that it reads; when there are no more lines, it ends.
"""

import json
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from benchmarks import measuring
from rlhf_jax.common import allocation
from rlhf_jax.common.errors import UserError

_SCRIPTS = pathlib.Path(__file__).parent / 'peers'
_TAIL = 15  # lines of its errors that are shown
_PATIENCE = 30.0  # seconds that it may take to end


class Peer:
  """A running program; a context manager that ends it."""

  def __init__(self, command: Sequence[str], title: str, where: str = '') -> None:
    """Starts `command`; messages name the library by its title, and where it is from."""
    self.title = title
    self.name = f'{title} by {where}' if where else title
    # A file takes all it writes there, however much, while it is not read.
    self._errors = tempfile.TemporaryFile(mode='w+', encoding='utf-8', errors='replace')
    self._process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._errors,
      text=True,
      env=_environment(),
    )

  def __enter__(self) -> 'Peer':
    return self

  def __exit__(self, *_: object) -> None:
    """Ends the program: it has no more to do."""
    try:
      self._process.communicate(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._errors.close()

  @property
  def process(self) -> int:
    """Its number."""
    return self._process.pid

  @property
  def peak_bytes(self) -> int | None:
    """The most memory it has had so far."""
    return measuring.peak_of(self.process)

  def loaded(self) -> dict[str, Any]:
    """What it says when it is ready to do steps. Raises UserError if it ends instead."""
    return self._hear()

  def step(self) -> dict[str, float]:
    """The seconds of a step's parts. Raises UserError if it ends instead."""
    assert self._process.stdin is not None
    try:
      self._process.stdin.write('go\n')
      self._process.stdin.flush()
    except BrokenPipeError:
      self._fail()
    return self._hear()

  def _hear(self) -> dict[str, Any]:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      self._fail()
    try:
      return json.loads(line)
    except ValueError as error:
      raise UserError(f'{self.name}: expected a line of JSON, it said {line!r}.') from error

  def _fail(self) -> NoReturn:
    code = self._process.wait()
    self._errors.seek(0)
    lines = self._errors.read().rstrip().splitlines()
    said = '\n'.join(lines[-_TAIL:]) or '(nothing)'
    raise UserError(f'{self.name}: it ended with code {code} in the middle. It said last:\n{said}')


Start = Callable[[], Peer]


class Contest(NamedTuple):
  """A job's steps, ours and a peer's.

  Attributes:
    rounds: what was measured, after a first step of each.
    first: seconds of the parts of our first step.
    others: the share of all cores that other processes used; None where the system does not tell.
    peer: its name, what it said when it was loaded, the seconds of its first step, and its peak of
      memory; None without a peer.
  """

  rounds: measuring.Rounds
  first: dict[str, float]
  others: float | None
  peer: dict[str, Any] | None

  def numbers(self) -> dict[str, Any]:
    """Those that every job has."""
    return {
      'seconds': self.rounds.summary(),
      'first_seconds': self.first,
      'others': self.others,
      'peak_bytes': measuring.peak_bytes(),
      'peer': self.peer,
    }


def contest(ours: measuring.Step, start: Start | None, repeats: int) -> Contest:
  """A first step of each, then our step, the peer's, our step, ...: so many of each.

  Args:
    ours: our step.
    start: starts the peer, which is done when all is measured; None: ours alone.
    repeats: how many.
  """
  first = ours()
  if start is None:
    load = measuring.Load()
    return Contest(measuring.alternate(ours, None, repeats), first, load.others(), None)
  with start() as peer:
    told = {'name': peer.title, 'loaded': peer.loaded(), 'first_seconds': peer.step()}
    load = measuring.Load([peer.process])
    rounds = measuring.alternate(ours, peer.step, repeats)
    return Contest(rounds, first, load.others(), {**told, 'peak_bytes': peer.peak_bytes})


class Library(NamedTuple):
  """A peer that there is a program for.

  Attributes:
    title: its name.
    script: the program that does jobs with it.
    jobs: those that it has; None: all.
    packages: what an environment for it needs, from a job to a folder's name and pip's arguments.
  """

  title: str
  script: pathlib.Path
  jobs: tuple[str, ...] | None
  packages: Callable[[str], tuple[str, str]]

  def has(self, job: str) -> bool:
    """Whether it can do a job."""
    return self.jobs is None or job in self.jobs

  def how_to_make(self, job: str) -> str:
    """How to make an environment for a job."""
    name, packages = self.packages(job)
    return (
      f'Make an environment for {job}, apart from that of this project: python -m venv {name} && '
      f'{name}/bin/pip install {packages}, and name {name}/bin/python.'
    )

  def check(self, python: str, job: str) -> None:
    """Raises UserError unless it has the job, and an interpreter the packages that this needs."""
    if not self.has(job):
      raise UserError(f'--job={job}: {self.title} has none like it.')
    if shutil.which(python) is None:
      raise UserError(f'{python}: there is no such program. {self.how_to_make(job)}')
    command = [python, str(self.script), json.dumps({'job': job, 'check': True})]
    found = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False)
    try:
      missing = json.loads(found.stdout)['missing']
    except ValueError as error:
      said = found.stderr.strip() or found.stdout.strip() or f'code {found.returncode}'
      raise UserError(f'{python}: not a Python that works ({said}).') from error
    if missing:
      raise UserError(f'{python}: it lacks {", ".join(missing)}. {self.how_to_make(job)}')

  def start(self, python: str, spec: Mapping[str, Any]) -> Peer:
    """Has it about to do a job as `spec` says, by an interpreter that `check` has passed."""
    return Peer([python, str(self.script), json.dumps(spec)], self.title, python)


def _trl_packages(job: str) -> tuple[str, str]:
  # The last release that has PPO is older than the one for other jobs.
  name, release = ('.venv-trl-ppo', '1.12') if job.startswith('ppo') else ('.venv-trl', '1.16')
  return name, f"'trl=={release}.*' 'torch==2.13.*'"


LIBRARIES = {
  'trl': Library('TRL', _SCRIPTS / 'trl_jobs.py', None, _trl_packages),
  'tunix': Library(
    'Tunix',
    _SCRIPTS / 'tunix_jobs.py',
    ('sft', 'dpo', 'generate', 'decode', 'ppo_iteration', 'ppo_separate', 'grpo_iteration'),
    lambda job: ('.venv-tunix', "'google-tunix==0.1.7'"),
  ),
}


def _environment() -> dict[str, str]:
  """Ours without what is for our interpreter alone; nothing is fetched from the hub."""
  names = ('PYTHONPATH', 'PYTHONHOME', 'VIRTUAL_ENV')
  kept = {name: value for name, value in os.environ.items() if name not in names}
  return {
    **allocation.ENVIRONMENT,  # what programs of ours settle for themselves
    **kept,
    'HF_HUB_OFFLINE': '1',
    'TOKENIZERS_PARALLELISM': 'false',
  }
