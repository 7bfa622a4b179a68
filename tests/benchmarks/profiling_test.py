"""A loop's host work counts as waiting wherever it stands, and costliest operations are named."""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import profiling
from benchmarks.loops import Training
from rlhf_jax.common.metrics import Mean
from rlhf_jax.training.recipe import Prepared

STEPS, SLEEP = 4, 0.3


@dataclasses.dataclass(frozen=True)
class State:
  """What the update moves."""

  matrix: jax.Array
  carry: dict[str, Any]


class Recipe:
  """A recipe of products of matrices, whose host work is to sleep."""

  def __init__(self, in_batch: float = 0.0, in_prepare: float = 0.0) -> None:
    self.in_batch, self.in_prepare = in_batch, in_prepare

    def multiply(matrix: jax.Array) -> jax.Array:
      return jax.lax.fori_loop(0, 20, lambda _, product: product @ matrix / 256, matrix)

    self.multiply: Callable[[jax.Array], jax.Array] = jax.jit(multiply)

  def batch(self, step: int) -> jax.Array:
    time.sleep(self.in_batch)
    return jnp.ones((256, 256))

  def prepare(self, state: State, batch: jax.Array) -> Prepared:
    samples = self.multiply(batch)
    time.sleep(self.in_prepare)
    return Prepared(self.multiply(samples), state.carry, {}, samples)

  def update(self, state: State, batch: jax.Array) -> tuple[State, dict[str, Any]]:
    moved = dataclasses.replace(state, matrix=self.multiply(batch))
    return moved, {'loss': Mean.of(moved.matrix)}


def profile_of(recipe: Any, folder: pathlib.Path) -> profiling.Profile:
  loop = Training(recipe, State(jnp.ones((256, 256)), {}))  # type: ignore[arg-type]
  loop.loop(2)
  return profiling.profile(lambda: loop.loop(STEPS), folder)


@pytest.mark.parametrize('place', ['in_batch', 'in_prepare'])
def test_host_work_is_waiting_wherever_it_stands(place: str, tmp_path: pathlib.Path) -> None:
  plain = profile_of(Recipe(), tmp_path / 'plain')
  slept = profile_of(Recipe(**{place: SLEEP}), tmp_path / 'slept')
  assert slept.seconds > STEPS * SLEEP
  assert plain.busy is not None and slept.busy is not None and plain.idle_share is not None
  # What the sleep is of a step, but for what the device still had in hand while it lasted.
  slept_share = STEPS * SLEEP / slept.seconds
  assert slept.idle_share == pytest.approx(slept_share, abs=0.05 + slept.busy / slept.seconds)
  assert slept.idle_share is not None and slept.idle_share > plain.idle_share + 0.2
  # The work itself is there in both.
  assert slept.busy > 0.3 * plain.busy


def test_operations_are_named_after_the_source(tmp_path: pathlib.Path) -> None:
  first = profile_of(Recipe(), tmp_path).operations[0]
  assert first.program == 'jit_multiply' and 'dot_general' in first.name and first.seconds > 0
  assert list(tmp_path.rglob('*.xplane.pb'))


def test_busy_is_where_anything_runs_the_mean_over_devices() -> None:
  """One device is busy for 4 of 10 s, of which 1 twice over, the other for 2."""
  spans = [('a', 0, 2), ('a', 1, 3), ('a', 5, 6), ('b', 7, 9)]
  events = [
    profiling._Event(device, start * 1e9, end * 1e9, 'jit_f', 'dot.1')
    for device, start, end in spans
  ]
  loop = profiling._Event('a', 0.0, 3e9, 'jit_f', 'while.7')
  found = profiling.summary([*events, loop], 10.0)
  assert found.busy == pytest.approx(3.0) and found.idle_share == pytest.approx(0.7)
  assert [(each.name, each.seconds) for each in found.operations] == [('dot.1', 7.0)]
  assert profiling.summary([], 10.0).idle_share is None


def test_parts_of_a_step_are_waited_for_one_by_one() -> None:
  loop = Training(Recipe(in_batch=SLEEP), State(jnp.ones((256, 256)), {}))  # type: ignore[arg-type]
  loop.parts()
  start = time.perf_counter()
  parts = loop.parts()
  assert list(parts) == ['rollout', 'score', 'update']
  assert parts['rollout'] > SLEEP > parts['score'] + parts['update'] > 0
  assert sum(parts.values()) <= time.perf_counter() - start
