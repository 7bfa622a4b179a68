"""The parts of a recipe that do not depend on the objective's family: optimizer, state, update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.models import adapters
from rlhf_jax.objectives import LossOutput, demands_of
from rlhf_jax.recipes.parts import StageParts, shardings_of
from rlhf_jax.sharding.mesh import batch_sharding, replicated
from rlhf_jax.sharding.rules import opt_state_shardings
from rlhf_jax.training.examine import Examined, examine
from rlhf_jax.training.optimizer import learning_rate_schedule, make_optimizer
from rlhf_jax.training.state import TrainState
from rlhf_jax.training.step import MoveTargets, Schedule, Updating, make_update

Array = jax.Array
WholeLoss = Callable[[dict[str, Any], Any], LossOutput]


class Trees(NamedTuple):
  """What a stage trains.

  Attributes:
    abstract: trained parameters by role, as shapes with shardings.
    init: makes them.
    carry: initial values of what the recipe carries from step to step, beside the guard's memory.
    targets: from trained parameters to the ones that follow them slowly, by role; None: none do.
    move_targets: how they follow.
    frozen: what is not trained of the roles that are trained in part, on the mesh.
  """

  abstract: dict[str, Any]
  init: Callable[[], dict[str, Any]]
  carry: dict[str, float]
  targets: Callable[[dict[str, Any]], dict[str, Any]] | None = None
  move_targets: MoveTargets | None = None
  frozen: dict[str, Any] = {}

  def whole(self, params: dict[str, Any]) -> dict[str, Any]:
    """Trees by role as models take them, from what is trained (and its targets)."""
    return adapters.join(self.frozen, params)


class Trainer(NamedTuple):
  """What makes and moves a state.

  Attributes:
    abstract: its shapes and shardings.
    init: makes it.
    update: jitted; the state is donated.
    examine: from `(state, batch)`, the first update of a step that goes wrong.
  """

  abstract: TrainState
  init: Callable[[], TrainState]
  update: Callable[[TrainState, Any], Any]
  examine: Callable[[TrainState, Any], Examined]


def make_trainer(parts: StageParts, trees: Trees, loss: WholeLoss) -> Trainer:
  """The optimizer, the sharded state, and the update.

  Args:
    parts: the stage's pieces.
    trees: what is trained.
    loss: `(whole params and targets by role, batch) -> (Mean, metrics)`.
  """
  config = parts.config
  demands = demands_of(config.objective)
  schedule = Schedule(demands.epochs, demands.minibatches, config.accumulation)
  total_updates = config.steps * schedule.epochs * schedule.minibatches
  optimizer = make_optimizer(config.optimizer, total_updates)
  carry = {**trees.carry, **config.health.carry()}

  def create(params: Any) -> TrainState:
    values = {name: jnp.asarray(value, jnp.float32) for name, value in carry.items()}
    targets = jax.tree.map(jnp.copy, trees.targets(params)) if trees.targets is not None else {}
    return TrainState.create(params, optimizer, config.seed, values, targets)

  abstract = _placed(parts, trees, optimizer, jax.eval_shape(create, trees.abstract))
  shardings = shardings_of(abstract)
  learning_rate = learning_rate_schedule(config.optimizer, total_updates)

  def updating(frozen: dict[str, Any]) -> Updating:
    def part_loss(params: Any, rows: Any, key: Array) -> LossOutput:
      whole = adapters.join(frozen, params)
      return loss(adapters.with_dropout(whole, key), rows)

    move = trees.move_targets
    return Updating(part_loss, optimizer, learning_rate, schedule, move, config.health)

  def update(state: TrainState, batch: Any, frozen: dict[str, Any]) -> Any:
    return make_update(*updating(frozen))(state, batch)

  def examined(state: TrainState, batch: Any) -> Examined:
    # Objectives that compare rows have no loss of a single one.
    return examine(updating(trees.frozen), state, batch, by_row=demands.group == 1)

  jitted = jax.jit(
    update,
    in_shardings=(shardings, batch_sharding(parts.mesh), None),
    out_shardings=(shardings, replicated(parts.mesh)),
    donate_argnums=0,
  )

  def init() -> TrainState:
    return jax.jit(
      create, in_shardings=(shardings.params,), out_shardings=shardings, donate_argnums=0
    )(trees.init())

  return Trainer(abstract, init, lambda state, batch: jitted(state, batch, trees.frozen), examined)


def _placed(
  parts: StageParts, trees: Trees, optimizer: optax.GradientTransformation, state: TrainState
) -> TrainState:
  """A state's shapes with shardings: moments lie as parameters do, numbers everywhere."""
  everywhere = replicated(parts.mesh)
  params = shardings_of(trees.abstract)
  shardings: Any = TrainState(
    step=everywhere,
    params=params,
    opt_state=opt_state_shardings(optimizer, trees.abstract, params, parts.mesh),
    key=everywhere,
    carry={name: everywhere for name in state.carry},
    targets={} if trees.targets is None else trees.targets(params),
  )
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    state,
    shardings,
  )
