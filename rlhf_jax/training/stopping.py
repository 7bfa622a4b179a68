"""Requests to stop: signals to one process, or to several that must agree on a step."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

from jax.experimental import multihost_utils

from rlhf_jax.common import processes


class _Preemption:
  """What the processes have agreed on so far; it outlives a loop."""

  asked = 0
  agreed = False

  @classmethod
  def due(cls) -> bool:
    """Whether the step at which all stop has come. Steps are counted over all loops."""
    cls.asked += 1
    cls.agreed = cls.agreed or multihost_utils.reached_preemption_sync_point(cls.asked)
    return cls.agreed


class Interrupted(BaseException):
  """A second signal has come in work that may be given up."""


class StopRequest:
  """Turns SIGTERM and SIGINT into a request that is honoured at the end of the current step.

  A second signal gives up what is `interruptible`. A third does what it would have done without
  this, and so does one that comes too late for another step.

  Of several processes, the one that gets SIGTERM tells the others by jax's preemption service, and
  all honour it at the same step, if need be one of the next loop; SIGINT stands for SIGTERM there,
  and a second one does what it would have done without this.
  """

  def __init__(self) -> None:
    self.honoured = False
    self._signals = 0
    self._interruptible = False
    self._number = 0
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> 'StopRequest':
    # A handler of SIGTERM would hide it from the preemption service.
    numbers = (signal.SIGINT,) if processes.several() else (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
      try:
        self._previous[number] = signal.signal(number, self._handle)
      except ValueError:  # not in the main thread: the owner of the process handles signals
        break
    return self

  @property
  def requested(self) -> bool:
    """Whether this process has got a signal."""
    return self._signals > 0

  def due(self) -> bool:
    """Whether to stop after the current step; to be asked once a step, by every process."""
    return _Preemption.due() if processes.several() else self.requested

  @contextlib.contextmanager
  def interruptible(self) -> Iterator[None]:
    """Work that raises Interrupted at a second signal: nothing of it is needed to go on later."""
    if self._signals > 1 and not processes.several():
      raise Interrupted
    self._interruptible = True
    try:
      yield
    finally:
      self._interruptible = False

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    self._signals += 1
    if self._signals > (1 if processes.several() else 2):
      self.honoured = True
      signal.signal(number, self._previous[number])
      signal.raise_signal(number)
    elif self._signals == 2 and self._interruptible:
      raise Interrupted
    self._number = number
    if processes.several():
      self.honoured = True
      os.kill(os.getpid(), signal.SIGTERM)

  def __exit__(self, error: type[BaseException] | None, *unused: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    if (
      self.requested and not self.honoured and error is None
    ):  # it came too late for the loop: pass it on
      signal.raise_signal(self._number)
