"""The steps of a job, one after the other."""

import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax

from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.common import prng
from rlhf_jax.common.types import Prompts
from rlhf_jax.training.recipe import Recipe
from rlhf_jax.training.state import TrainState
from rlhf_jax.training.writers import JsonlWriter


class Loop(Protocol):
  """Steps that follow each other."""

  def step(self) -> Any:
    """Dispatches the next one; what it returns is there when the step is done."""

  def loop(self, steps: int) -> None:
    """So many of them, as they are made where nobody times them, until the last is done."""


class Training:
  """Steps of training, from a state that they use up."""

  def __init__(self, recipe: Recipe, state: TrainState) -> None:
    self._recipe, self._state, self._number = recipe, state, 0

  def step(self) -> Any:
    """Dispatches the next step, and returns its metrics."""
    prepared = self._recipe.prepare(self._state, self._recipe.batch(self._number))
    return {**prepared.metrics, **self._update(prepared)}

  def parts(self) -> dict[str, float]:
    """Makes a step of a job with rollouts, and waits for the end of each part: their seconds.

    'rollout' is the batch and its responses, 'score' all that judges them, 'update' the rest. Each
    of them ends when its arrays are there: programs run in the order in which they are dispatched.
    """
    clock = [time.perf_counter()]

    def wait(arrays: Any) -> None:
      jax.block_until_ready(arrays)
      clock.append(time.perf_counter())

    prepared = self._recipe.prepare(self._state, self._recipe.batch(self._number))
    wait(prepared.samples)
    wait((prepared.batch, prepared.carry, prepared.metrics))
    wait(self._update(prepared))
    times = zip(clock[1:], clock[:-1], strict=True)
    names = ('rollout', 'score', 'update')
    return {name: end - start for name, (end, start) in zip(names, times, strict=True)}

  def loop(self, steps: int) -> None:
    """Makes steps as `training.loop` does: metrics are read and written one step behind."""
    pending = None
    with tempfile.TemporaryDirectory() as folder:
      writer = JsonlWriter(pathlib.Path(folder) / 'metrics.jsonl', keep_through=-1)
      for number in range(steps):
        metrics = self.step()
        if pending is not None:
          writer.write(number, metrics_lib.values(pending))
        pending = metrics
      if pending is not None:
        writer.write(steps, metrics_lib.values(pending))
      writer.close()

  def _update(self, prepared: Any) -> Any:
    state = dataclasses.replace(self._state, carry=prepared.carry)
    self._state, metrics = self._recipe.update(state, prepared.batch)
    self._number += 1
    return metrics


class Sampling:
  """Rounds of sampling, from the same prompts and parameters."""

  def __init__(self, sample: Callable[..., Any], params: Any, prompts: Prompts) -> None:
    """`sample` is of `recipes.policies.make_sampler`."""
    self._sample, self._params, self._prompts = jax.jit(sample), params, prompts
    self._number = 0

  def step(self) -> Any:
    """Dispatches a round, and returns the responses."""
    self._number += 1
    return self._sample(self._params, self._prompts, prng.base_key(self._number))

  def loop(self, steps: int) -> None:
    """Rounds that are waited for at their end."""
    jax.block_until_ready([self.step() for _ in range(steps)])
