"""Runs a program of experiments/ as a user does, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_program(name: str, *flags: str, typed: str = '') -> subprocess.CompletedProcess[str]:
  """`python -m experiments.NAME flags`, with compiled programs shared with the tests'."""
  cache = f'--cache_dir={os.environ["JAX_COMPILATION_CACHE_DIR"]}'
  return subprocess.run(
    [sys.executable, '-m', f'experiments.{name}', cache, *flags],
    cwd=ROOT,
    input=typed,
    capture_output=True,
    text=True,
    timeout=300,
  )


def message(done: subprocess.CompletedProcess[str]) -> str:
  """What a program said to a mistake: one message, without a traceback, exit code 1."""
  assert done.returncode == 1, (done.returncode, done.stderr)
  assert 'Traceback' not in done.stderr
  assert done.stderr.count('error: ') == 1, done.stderr
  return done.stderr.partition('error: ')[2]
