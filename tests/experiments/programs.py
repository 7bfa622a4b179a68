"""Runs a program of experiments/ as a user does, in a process of its own."""

import atexit
import functools
import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300


@functools.cache
def _server(settings: frozenset[tuple[str, str]]) -> subprocess.Popen[str]:
  """A process that has imported the libraries, and forks for every program (`forking`).

  `settings` is what jax reads of the environment when it is imported.
  """
  del settings  # it is in this process's environment
  server = subprocess.Popen(
    [sys.executable, '-m', 'tests.experiments.forking'],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  atexit.register(server.kill)
  return server


def run_program(name: str, *flags: str, typed: str = '') -> subprocess.CompletedProcess[str]:
  """`python -m experiments.NAME flags`, with compiled programs shared with the tests'."""
  cache = f'--cache_dir={os.environ["JAX_COMPILATION_CACHE_DIR"]}'
  with tempfile.TemporaryDirectory() as folder:
    files = [Path(folder) / stream for stream in ('in', 'out', 'error')]
    files[0].write_text(typed)
    request = {
      'module': f'experiments.{name}',
      'flags': [cache, *flags],
      'directory': str(ROOT),
      'environment': dict(os.environ),
      'files': [str(file) for file in files],
    }
    server = _server(frozenset(item for item in os.environ.items() if item[0].startswith('JAX_')))
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(request) + '\n')
    server.stdin.flush()
    if not select.select([server.stdout], [], [], TIMEOUT)[0]:
      server.kill()
      _server.cache_clear()
      raise subprocess.TimeoutExpired(f'experiments.{name} {" ".join(flags)}', TIMEOUT)
    code = json.loads(server.stdout.readline())
    out, error = (file.read_text() for file in files[1:])
  return subprocess.CompletedProcess([name, *flags], code, out, error)


def message(done: subprocess.CompletedProcess[str]) -> str:
  """What a program said to a mistake: one message, without a traceback, exit code 1."""
  assert done.returncode == 1, (done.returncode, done.stderr)
  assert 'Traceback' not in done.stderr
  assert done.stderr.count('error: ') == 1, done.stderr
  return done.stderr.partition('error: ')[2]
