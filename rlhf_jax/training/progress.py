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

  def __init__(
    self, name: str, steps: int, start: int = 0, tokens: int = 0, out: TextIO | None = None
  ):
    self._name, self._steps, self._out = name, steps, out
    self._last_step, self._last_tokens, self._last_time = start, tokens, time.monotonic()

  def skip(self) -> None:
    """Leaves the time since the last line out of the speeds (compilation, evaluation)."""
    self._last_time = time.monotonic()

  def compiled(self, step: int, tokens: int) -> None:
    """Says that the steps up to this one, and the tokens they saw, are no measure of speed."""
    self._last_step, self._last_tokens = step, tokens
    self.skip()

  def line(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
    """Prints steps/s, tokens/s, ETA and the main metrics; `tokens` are all that were seen."""
    elapsed = max(time.monotonic() - self._last_time, 1e-9)
    rate, speed, eta = '?', '?', '?'
    if step > self._last_step:
      rate = f'{(step - self._last_step) / elapsed:.2f}'
      speed = f'{(tokens - self._last_tokens) / elapsed:,.0f}'
      eta = duration((self._steps - step) * elapsed / (step - self._last_step))
    shown = ' '.join(f'{name} {value:.4g}' for name, value in values.items())
    print(
      f'{self._name} {step}/{self._steps} | {rate} steps/s {speed} tokens/s ETA {eta} | {shown}',
      file=self._out or sys.stderr,
      flush=True,
    )
    self._last_step, self._last_tokens, self._last_time = step, tokens, time.monotonic()
