"""Runs a program whose clock of the day jumps by days, forwards and back, several times a second.

python -m experiments.drilling.clock experiments.train --config=... --workdir=...
"""

import runpy
import sys
import time
from collections.abc import Callable
from typing import Any

# Seconds between jumps, and how many days off the clock then is, in turn.
EVERY = 0.4
DAYS_OFF = (0, 3, -2, 5, -4)


def jumping(read: Callable[[], Any], unit: int) -> Callable[[], Any]:
  """A clock like `read`, in which a second has `unit` ticks, that is days off at times."""

  def jumped() -> Any:
    days = DAYS_OFF[int(time.monotonic() / EVERY) % len(DAYS_OFF)]
    return read() + days * 86_400 * unit

  return jumped


def main() -> None:
  time.time = jumping(time.time, 1)
  time.time_ns = jumping(time.time_ns, 10**9)
  module, sys.argv[:] = sys.argv[3], sys.argv[3:]
  runpy.run_module(module, run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  main()
