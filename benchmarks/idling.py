"""How much of a training loop's time the device waits for the host."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from rlhf_jax.recipes import Built
from rlhf_jax.training.recipe import Recipe

_ROUNDS = 3


def idle_share(built: Built, steps: int) -> float:
  """One less the time that a loop's steps take by themselves over the time of the loop.

  The loop makes its batches, and reads its metrics one step behind, as training does; the steps
  alone are dispatched all at once, on one batch, and waited for at their end. It is for objectives
  that learn from given responses: rollouts wait for the host within a step.
  """
  recipe = built.recipe
  with jax.set_mesh(built.mesh):
    first = recipe.batch(0)
    loops, alone = [], []
    for _ in range(_ROUNDS):
      loops.append(_seconds(recipe, recipe.batch, steps, settle=True))
      alone.append(_seconds(recipe, lambda _: first, steps, settle=False))
  return max(0.0, 1 - statistics.median(alone) / statistics.median(loops))


def _seconds(recipe: Recipe, batch: Callable[[int], Any], steps: int, *, settle: bool) -> float:
  """What so many steps take, after a first one."""
  state, start, pending = recipe.init(), 0.0, None
  for number in range(1 + steps):
    prepared = recipe.prepare(state, batch(number))
    state, metrics = recipe.update(dataclasses.replace(state, carry=prepared.carry), prepared.batch)
    if number == 0:
      jax.block_until_ready(state)
      start = time.perf_counter()
      continue
    if settle and pending is not None:
      jax.device_get(pending)
    pending = metrics
  jax.block_until_ready((state, pending))
  return time.perf_counter() - start
