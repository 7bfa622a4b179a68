"""The progress line: where a run is, how fast it goes, when it will be done."""

import sys
import time
from collections.abc import Mapping
from typing import TextIO


def duration(seconds: float) -> str:
  """`75 -> '1:15'`, `3675 -> '1:01:15'`."""
  minutes, seconds_left = divmod(int(seconds + 0.5), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds_left:02}' if hours else f'{minutes}:{seconds_left:02}'


class Progress:
  """Prints a line at each log point.

  Speeds are those since the last line; the first step of a process, which compiles, is left out of
  the estimate of what remains.
  """

  def __init__(self, name: str, steps: int, start: int, out: TextIO | None = None):
    self._name, self._steps, self._out = name, steps, out
    self._last_step, self._last_time = start, time.monotonic()

  def skip(self) -> None:
    """Leaves the time since the last line out of the speeds (compilation, evaluation)."""
    self._last_time = time.monotonic()

  def compiled(self, step: int) -> None:
    """Says that steps up to this one are no measure of speed."""
    self._last_step = step
    self.skip()

  def line(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
    """Prints steps/s, tokens/s (`tokens` since the last line), ETA and the main metrics."""
    elapsed = max(time.monotonic() - self._last_time, 1e-9)
    rate = (step - self._last_step) / elapsed
    eta = duration((self._steps - step) / rate) if rate > 0 else '?'
    shown = ' '.join(f'{name} {value:.4g}' for name, value in values.items())
    print(
      f'{self._name} {step}/{self._steps} | {rate:.2f} steps/s {tokens / elapsed:,.0f} tokens/s '
      f'ETA {eta} | {shown}',
      file=self._out or sys.stderr,
      flush=True,
    )
    self._last_step, self._last_time = step, time.monotonic()
