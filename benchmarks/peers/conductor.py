"""How the programs in this folder speak with `benchmarks.peer`, which tells them when to go on."""

import json
import os
import sys
import time

STARTED = time.perf_counter()


class Conductor:
  """Waits for the word to begin a step, and says how long it took."""

  def __init__(self, versions):
    # What libraries print is for people: it goes where errors go.
    self._output = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    self._versions = versions
    self._start = 0.0

  def say(self, values):
    print(json.dumps(values), file=self._output, flush=True)

  def loaded(self, parameters):
    """All is there for the first step, of a model with so many parameters."""
    seconds = time.perf_counter() - STARTED
    self.say({'loading': seconds, 'parameters': parameters, 'versions': self._versions})
    self.wait()

  def wait(self):
    """Returns when a step is to begin; ends the program when there are no more."""
    if not sys.stdin.readline():
      sys.exit(0)
    self._start = time.perf_counter()

  def done(self, **parts):
    """A step is over; `parts` are its seconds unless it has one part."""
    self.say(parts or {'step': time.perf_counter() - self._start})
    self.wait()
