"""One iteration's update: epochs of minibatches of accumulated gradients, as one pure function."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.common.metrics import First, Max, Mean, Metrics
from rlhf_jax.common.prng import Stream
from rlhf_jax.common.rows import split_rows
from rlhf_jax.training.health import NORMS, SKIPPED, USABLE, HealthConfig, judge
from rlhf_jax.training.state import TrainState

Array = jax.Array
# (params by role, with the targets among them; batch; key) -> (loss as total and weight, metrics)
Loss = Callable[[Any, Any, Array], tuple[Mean, Metrics]]
# (targets, params after an update) -> targets
MoveTargets = Callable[[dict[str, Any], Any], dict[str, Any]]


class Schedule(NamedTuple):
  """How an iteration's batch becomes optimizer updates.

  Attributes:
    epochs: passes over the batch.
    minibatches: optimizer updates a pass; rows are shuffled when there is more than one.
    accumulation: microbatches a minibatch is split into, to save memory.
  """

  epochs: int = 1
  minibatches: int = 1
  accumulation: int = 1


def accumulate_gradients(
  loss: Loss, params: Any, batch: Any, accumulation: int, key: Array
) -> tuple[Any, Mean, Metrics]:
  """Gradient of (summed total / summed weight) over microbatches, whatever their number.

  Every microbatch has a key of its own, so a loss that draws random numbers depends on how many
  there are; no other does.

  Returns gradients like `params`, the loss, and the merged metrics.
  """

  def total(params: Any, rows: Any, key: Array) -> tuple[Array, tuple[Mean, Metrics]]:
    mean, metrics = loss(params, rows, key)
    return mean.total, (jax.lax.stop_gradient(mean), metrics)

  gradient = jax.grad(total, has_aux=True)
  if accumulation == 1:
    gradients, (mean, metrics) = gradient(params, batch, key)
  else:

    def add(gradients: Any, part: tuple[Any, Array]) -> tuple[Any, tuple[Mean, Metrics]]:
      more, aux = gradient(params, *part)
      return jax.tree.map(jnp.add, gradients, more), aux

    zeros = jax.tree.map(jnp.zeros_like, params)
    parts = (split_rows(batch, accumulation), jax.random.split(key, accumulation))
    gradients, (means, stacked) = jax.lax.scan(add, zeros, parts)
    mean, metrics = means.reduce(), metrics_lib.reduce(stacked)
  weight = jnp.where(mean.weight == 0, 1.0, mean.weight)
  return jax.tree.map(lambda g: g / weight, gradients), mean, metrics


class Moving(NamedTuple):
  """The parts of a state that every optimizer update moves."""

  params: Any
  opt_state: Any
  targets: dict[str, Any]


class Carry(NamedTuple):
  """What goes from update to update: what is moved, and the guard's memory."""

  moving: Moving
  memory: dict[str, Array]


class Updating(NamedTuple):
  """How optimizer updates are made.

  Attributes:
    loss: what is minimised, in the state's params; its targets are constants to it.
    optimizer: moves params.
    learning_rate: as in the optimizer, for the metrics.
    schedule: epochs, minibatches, accumulation.
    move_targets: moves the state's targets after every optimizer update; None: they stay.
    health: which updates are left out.
  """

  loss: Loss
  optimizer: optax.GradientTransformation
  learning_rate: optax.Schedule
  schedule: Schedule
  move_targets: MoveTargets | None
  health: HealthConfig

  def gradients(self, moving: Moving, batch: Any, key: Array) -> tuple[Any, Mean, Metrics]:
    """Of one update: gradients, loss, metrics."""
    fixed = jax.lax.stop_gradient(moving.targets)
    return accumulate_gradients(
      lambda params, rows, key: self.loss({**params, **fixed}, rows, key),
      moving.params,
      batch,
      self.schedule.accumulation,
      key,
    )

  def once(
    self, carry: Carry, batch: Any, count: Array, key: Array, usable: Array | None
  ) -> tuple[Carry, Metrics]:
    """One update, or what is left of it where it is left out."""
    params, opt_state, targets = carry.moving
    gradients, mean, metrics = self.gradients(carry.moving, batch, key)
    norm = optax.tree.norm(gradients)
    updates, opt_state = self.optimizer.update(gradients, opt_state, params)
    params = optax.apply_updates(params, updates)
    if self.move_targets is not None:
      targets = self.move_targets(targets, params)
    moving = Moving(params, opt_state, targets)
    verdict = judge(self.health, carry.memory, mean.value(), norm, usable)
    apply = verdict.apply
    if apply is not None:
      moving = jax.tree.map(lambda new, old: jnp.where(apply, new, old), moving, carry.moving)
      count = count - carry.memory[SKIPPED].astype(jnp.int32)  # as the optimizer counts
    return Carry(moving, verdict.memory), {
      **metrics,
      **verdict.metrics,
      'loss': mean,
      'gradient_norm': Mean.of(norm),
      'gradient_norm_max': Max(norm),
      'learning_rate': First(self.learning_rate(count)),
    }


def carry_of(state: TrainState) -> Carry:
  """What an iteration's first update finds."""
  memory = {name: state.carry[name] for name in (NORMS, SKIPPED) if name in state.carry}
  return Carry(Moving(state.params, state.opt_state, state.targets), memory)


def make_update(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  learning_rate: optax.Schedule,
  schedule: Schedule,
  move_targets: MoveTargets | None = None,
  health: HealthConfig | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
  """The pure function `(state, batch) -> (state, metrics)` of one iteration; the caller jits it.

  Minibatch order comes from the state's `MINIBATCHES` stream, the loss's keys from its `DROPOUT`
  stream. Metrics are merged over all updates;
  'loss' and 'gradient_norm' (before clipping) are among them.

  Args:
    loss: what is minimised, in the state's params; its targets are constants to it.
    optimizer: moves params.
    learning_rate: as in the optimizer, for the metrics.
    schedule: epochs, minibatches, accumulation.
    move_targets: moves the state's targets after every optimizer update; None: they stay.
    health: which updates are left out; None: none. They leave no trace in parameters, optimizer
      and targets; only the step goes on.
  """
  policy = HealthConfig() if health is None else health
  updating = Updating(loss, optimizer, learning_rate, schedule, move_targets, policy)
  updates_per_step = schedule.epochs * schedule.minibatches

  def update(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
    start = state.step * updates_per_step
    carry, usable = carry_of(state), state.carry.get(USABLE)
    key = state.stream(Stream.DROPOUT)
    if updates_per_step == 1:
      carry, metrics = updating.once(carry, batch, start, key, usable)
    else:
      order = order_of(state, batch, schedule)

      def body(carry: Carry, item: tuple[Array, Array]) -> tuple[Carry, Metrics]:
        rows, number = item
        minibatch = jax.tree.map(lambda x: x[rows], batch)
        draws = jax.random.fold_in(key, number)
        return updating.once(carry, minibatch, start + number, draws, usable)

      carry, stacked = jax.lax.scan(body, carry, (order, jnp.arange(updates_per_step)))
      metrics = metrics_lib.over_updates(stacked)
    kept = {**state.carry, **carry.memory}
    return (
      dataclasses.replace(state, step=state.step + 1, carry=kept, **carry.moving._asdict()),
      metrics,
    )

  return update


def order_of(state: TrainState, batch: Any, schedule: Schedule) -> Array:
  """Row numbers of each of an iteration's updates; see `minibatch_order`."""
  rows = jax.tree.leaves(batch)[0].shape[0]
  return minibatch_order(state.stream(Stream.MINIBATCHES), rows, schedule)


def minibatch_order(key: Array, rows: int, schedule: Schedule) -> Array:
  """Row numbers of each update, `[epochs * minibatches, rows / minibatches]` int32.

  Every epoch is a permutation of its own: each row is seen exactly `epochs` times. Where all rows
  are one minibatch they stay as they are.
  """
  if schedule.minibatches == 1:
    return jnp.broadcast_to(jnp.arange(rows), (schedule.epochs, rows))
  keys = jax.random.split(key, schedule.epochs)
  order = jax.vmap(lambda k: jax.random.permutation(k, rows))(keys)
  return order.reshape(schedule.epochs * schedule.minibatches, rows // schedule.minibatches)
