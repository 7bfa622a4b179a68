"""Looks for what goes wrong in a step: update by update, gradient by gradient, row by row."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.common import trees
from rlhf_jax.common.prng import Stream
from rlhf_jax.training.health import NORMS, USABLE
from rlhf_jax.training.state import TrainState
from rlhf_jax.training.step import Moving, Updating, carry_of, order_of

Array = jax.Array


class Examined(NamedTuple):
  """The first update of a step whose loss or gradients are not finite.

  If there is none, the first whose gradient norm is a spike; if there is none either, the last.

  Attributes:
    update: its number in the step, from 0.
    updates: how many the step has.
    found: whether it is not finite.
    spike: how many times the median of those before it its gradient norm is; 0 if it is no spike.
    rows: `[b]` row numbers of the batch that it learns from.
    values: its loss, gradient norm and metrics.
    gradients: how many numbers of each gradient are not finite, by name, of those that have any.
    losses: `[b]`, the loss of each row alone, and
    norms: `[b]`, its gradient's norm; None where rows have none by themselves.
  """

  update: int
  updates: int
  found: bool
  spike: float
  rows: np.ndarray
  values: dict[str, float]
  gradients: dict[str, int]
  losses: np.ndarray | None
  norms: np.ndarray | None


class _Seen(NamedTuple):
  """An update that was looked at: what it was made from, and what came of it."""

  update: int
  found: bool
  spike: float
  moving: Moving
  part: Any
  draws: Array
  values: dict[str, float]
  gradients: Any


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
  chosen: _Seen | None = None
  for update in range(updates):
    part = jax.tree.map(lambda x, update=update: x[order[update]], batch)
    draws = key if updates == 1 else jax.random.fold_in(key, update)
    gradients, mean, metrics = gradients_of(carry.moving, part, draws)
    values = metrics_lib.values({**metrics, 'loss': mean})
    values['gradient_norm'] = float(optax.tree.norm(gradients))
    found = not np.isfinite([values['loss'], values['gradient_norm']]).all()
    before, spike = carry.moving, 0.0
    if not found and (NORMS in carry.memory or update < updates - 1):
      count = state.step * updates + update
      carry, made = once(carry, part, count, draws, state.carry.get(USABLE))
      judged = metrics_lib.values(made)
      spike = judged['gradient_spike_ratio'] if judged.get('gradient_spikes') else 0.0
    if found or chosen is None or not chosen.spike:
      chosen = _Seen(update, found, spike, before, part, draws, values, gradients)
    if found:
      break
  assert chosen is not None
  losses, norms = None, None
  if by_row:
    losses, norms = _row_by_row(updating, chosen.moving, chosen.part, chosen.draws)
  return Examined(
    chosen.update,
    updates,
    chosen.found,
    chosen.spike,
    order[chosen.update],
    chosen.values,
    nonfinite_counts(chosen.gradients),
    losses,
    norms,
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
