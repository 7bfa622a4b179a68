"""Looks for what goes wrong in a step: update by update, gradient by gradient, row by row."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.common import trees
from rlhf_jax.common.prng import Stream
from rlhf_jax.training.health import USABLE
from rlhf_jax.training.state import TrainState
from rlhf_jax.training.step import Updating, carry_of, order_of

Array = jax.Array


class Examined(NamedTuple):
  """The first update of a step whose loss or gradients are not finite, or the last, if none is.

  Attributes:
    update: its number in the step, from 0.
    updates: how many the step has.
    found: whether it is not finite.
    rows: `[b]` row numbers of the batch that it learns from.
    values: its loss, gradient norm and metrics.
    gradients: how many numbers of each gradient are not finite, by name, of those that have any.
    losses: `[b]`, the loss of each row alone, and
    norms: `[b]`, its gradient's norm; None where rows have none by themselves.
  """

  update: int
  updates: int
  found: bool
  rows: np.ndarray
  values: dict[str, float]
  gradients: dict[str, int]
  losses: np.ndarray | None
  norms: np.ndarray | None


def nonfinite_counts(tree: Any) -> dict[str, int]:
  """How many numbers of each leaf are not finite, by name, of the leaves that have any."""

  @jax.jit
  def count(leaves: dict[str, Any]) -> dict[str, Array]:
    return {name: (~jnp.isfinite(leaf)).sum() for name, leaf in leaves.items()}

  counts = jax.device_get(count(trees.flatten(tree)))
  return {name: int(number) for name, number in counts.items() if number}


def examine(updating: Updating, state: TrainState, batch: Any, *, by_row: bool) -> Examined:
  """Makes a step's updates one after the other until one goes wrong.

  Programs are compiled for this alone: it is for once. The state is not used up.

  Args:
    updating: how updates are made.
    state: before the step, with the carry that its preparation made.
    batch: what it learns from.
    by_row: whether the loss is defined for a row by itself.
  """
  schedule = updating.schedule
  updates = schedule.epochs * schedule.minibatches
  rows = jax.tree.leaves(batch)[0].shape[0]
  order = np.arange(rows)[None]
  if updates > 1:
    order = np.asarray(order_of(state, batch, schedule))
  once, gradients_of = jax.jit(updating.once), jax.jit(updating.gradients)
  carry, key = carry_of(state), state.stream(Stream.DROPOUT)
  for update in range(updates):
    part = jax.tree.map(lambda x, update=update: x[order[update]], batch)
    draws = key if updates == 1 else jax.random.fold_in(key, update)
    gradients, mean, metrics = gradients_of(carry.moving, part, draws)
    norm = optax.tree.norm(gradients)
    values = metrics_lib.values({**metrics, 'loss': mean})
    values['gradient_norm'] = float(norm)
    found = not np.isfinite([values['loss'], values['gradient_norm']]).all()
    if found or update == updates - 1:
      break
    count = state.step * updates + update
    carry, _ = once(carry, part, count, draws, state.carry.get(USABLE))
  losses, norms = _row_by_row(updating, carry.moving, part, draws) if by_row else (None, None)
  return Examined(
    update, updates, found, order[update], values, nonfinite_counts(gradients), losses, norms
  )


def _row_by_row(
  updating: Updating, moving: Any, batch: Any, key: Array
) -> tuple[np.ndarray, np.ndarray]:
  """Loss and gradient norm of each row alone."""
  alone = updating._replace(schedule=updating.schedule._replace(accumulation=1))

  @jax.jit
  def rows(batch: Any) -> tuple[Array, Array]:
    def row(one: Any) -> tuple[Array, Array]:
      gradients, mean, _ = alone.gradients(moving, jax.tree.map(lambda x: x[None], one), key)
      return mean.value(), optax.tree.norm(gradients)

    return jax.lax.map(row, batch)

  losses, norms = jax.device_get(rows(batch))
  return losses, norms
