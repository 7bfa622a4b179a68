"""The programs of a stage, compiled for a simulated mesh from shapes alone.

Recipes are built inside the traced functions, from frozen trees that are arguments there: the
programs are those that training runs, whatever a recipe makes of its pieces.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.common import prng
from rlhf_jax.common.types import Sequences
from rlhf_jax.objectives import demands_of, objective_of
from rlhf_jax.planning import hlo
from rlhf_jax.planning.stage import (
  PlannedParts,
  PlannedStage,
  abstract_batch,
  abstract_prompts,
  abstract_sequences,
)
from rlhf_jax.recipes import offline, online, probes
from rlhf_jax.recipes.engines import sampling_mesh
from rlhf_jax.recipes.policies import make_kl, make_sampler
from rlhf_jax.recipes.rewards import PLAINLY, FrozenRewardModel, Reading, make_score
from rlhf_jax.recipes.sharing import shared_samples
from rlhf_jax.recipes.trainer import Trainer, make_trainer
from rlhf_jax.rollout.engine import Generated
from rlhf_jax.rollout.rollout import Scored
from rlhf_jax.sharding.mesh import batch_sharding, replicated, row_devices
from rlhf_jax.sharding.rules import relaid
from rlhf_jax.training.state import TrainState

Array = jax.Array


class CompiledProgram(NamedTuple):
  """What the compiler made of a program, for one device.

  Attributes:
    temporary: bytes of intermediate arrays at once.
    extra: bytes of arguments and results that are not among the stage's resident trees.
    flops: XLA's count; a loop's body is counted once.
    read: collectives and large arrays.
    seconds: how long tracing and compiling took.
  """

  temporary: int
  extra: int
  flops: float
  read: hlo.Program
  seconds: float


class Compiled(NamedTuple):
  """All programs of a stage by name, and the trees that stay on the devices.

  Attributes:
    state: shapes and shardings of the training state.
    frozen: of the frozen trees, by role.
    batch: shapes of what the update learns from.
    programs: in the order in which a step runs them.
    evaluations: what evaluations along the run run, at `evaluation.batch_size` rows.
  """

  state: TrainState
  frozen: dict[str, Any]
  batch: Any
  programs: dict[str, CompiledProgram]
  evaluations: dict[str, CompiledProgram]


class _Pieces(NamedTuple):
  """Programs of a stage as functions of `(state, frozen, inputs)`, and what its state looks like.

  Attributes:
    trainer: the state's shapes and the update.
    functions: what comes before the update, in order; each gets the results of the one before.
    evaluations: what each one reads, and the function.
  """

  trainer: Trainer
  functions: dict[str, Callable[[TrainState, Any], Any]]
  evaluations: dict[str, tuple[Any, Callable[[TrainState, Any], Any]]]


def compile_stage(stage: PlannedStage, say: Callable[[str], None] = lambda _: None) -> Compiled:
  """Compiles what a step of the stage runs; `say` hears of progress."""
  frozen = stage.frozen()
  pieces = _online if objective_of(stage.config.objective).data == 'prompts' else _offline
  built: list[_Pieces] = []

  def look(frozen: Any) -> None:
    built.append(pieces(stage, frozen))

  elsewhere = sampling_mesh(stage.config, stage.model, stage.mesh)
  with jax.set_mesh(stage.mesh):
    jax.eval_shape(look, frozen)
    state = built[0].trainer.abstract
    programs = {}
    inputs = _placed(abstract_batch(stage.config), stage)
    for name in built[0].functions:

      def run(state: Any, frozen: Any, inputs: Any, name: str = name) -> Any:
        return pieces(stage, frozen).functions[name](state, inputs)

      say(f'compiling {name}')
      arguments = (state, frozen, inputs)
      if name == 'generation' and elsewhere is not None:
        with jax.set_mesh(elsewhere):
          programs[name] = _compile(jax.jit(run), relaid(arguments, elsewhere), stage, elsewhere)
      else:
        programs[name] = _compile(jax.jit(run), arguments, stage)
      inputs = _placed(jax.eval_shape(run, *arguments), stage)

    def update(state: Any, frozen: Any, inputs: Any) -> Any:
      return pieces(stage, frozen).trainer.update(state, inputs)

    say('compiling update')
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(update, donate_argnums=0, out_shardings=(shardings, replicated(stage.mesh)))
    programs['update'] = _compile(jitted, (state, frozen, inputs), stage)
    evaluations = {}
    for name, (read, _) in built[0].evaluations.items():

      def ask(state: Any, frozen: Any, inputs: Any, name: str = name) -> Any:
        return pieces(stage, frozen).evaluations[name][1](state, inputs)

      say(f'compiling the evaluation of {name}')
      evaluations[name] = _compile(jax.jit(ask), (state, frozen, _placed(read, stage)), stage)
  return Compiled(state, frozen, inputs, programs, evaluations)


def _compile(
  function: Any,
  arguments: tuple[Any, Any, Any],
  stage: PlannedStage,
  elsewhere: jax.sharding.Mesh | None = None,
) -> CompiledProgram:
  start = time.perf_counter()
  mesh = stage.mesh if elsewhere is None else elsewhere
  compiled = function.lower(*arguments).compile()
  memory: Any = compiled.memory_analysis()
  costs = compiled.cost_analysis() or {}
  costs = costs[0] if isinstance(costs, list) else costs
  read = hlo.read(compiled.as_text(), dict(mesh.shape), stage.config.data.response_length)
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return CompiledProgram(
    memory.temp_size_in_bytes,
    device_bytes(arguments[2]) + results,
    float(costs.get('flops', 0.0)),
    read,
    time.perf_counter() - start,
  )


def device_bytes(tree: Any) -> int:
  """Bytes of a tree of shapes with shardings on one device."""

  def size(leaf: Any) -> int:
    count = 1
    for extent in leaf.sharding.shard_shape(leaf.shape):
      count *= extent
    return count * jnp.dtype(leaf.dtype).itemsize

  return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def _placed(tree: Any, stage: PlannedStage) -> Any:
  """Rows over data and fsdp, and what has no rows everywhere, as the loop lays batches."""
  devices = row_devices(stage.mesh)

  def place(leaf: Any) -> Any:
    rows = leaf.ndim > 0 and leaf.shape[0] % devices == 0
    sharding = batch_sharding(stage.mesh) if rows else replicated(stage.mesh)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(place, tree)


def _offline(stage: PlannedStage, frozen: Mapping[str, Any]) -> _Pieces:
  """Scoring by the reference, and the update."""
  config = stage.config
  parts = stage.parts(frozen.get('reference'))
  objective = objective_of(config.objective)
  actors = offline.make_actors(parts)
  trees = offline.make_trees(parts)

  def loss(params: Any, batch: Any) -> Any:
    return objective.loss(config.objective, actors, params, batch)

  preparation = offline.make_preparation(parts, actors, config.accumulation)

  def score(state: TrainState, batch: Any) -> Any:
    return preparation(trees.whole(state.by_role), batch)

  def whole(state: TrainState) -> Any:
    return trees.whole(state.by_role)

  evaluations = _of_policies(stage, parts, frozen, whole)
  if offline.asks_of_records(parts):
    answer = (probes.make_losses if objective.difference is None else probes.make_differences)(
      parts, actors
    )
    alone = offline.make_preparation(parts, actors)

    def records(state: TrainState, batch: Any) -> Any:
      return answer(whole(state), alone(whole(state), batch))

    rows = dataclasses.replace(config, batch_size=config.evaluation.batch_size)
    evaluations['records'] = (abstract_batch(rows), records)
  needed = 'reference' in frozen or demands_of(config.objective).prepares != 'nothing'
  functions: dict[str, Callable[[TrainState, Any], Any]] = {'scoring': score} if needed else {}
  return _Pieces(make_trainer(parts, trees, loss), functions, evaluations)


def _of_policies(
  stage: PlannedStage,
  parts: PlannedParts,
  frozen: Mapping[str, Any],
  whole: Callable[[TrainState], Any],
) -> dict[str, tuple[Any, Callable[[TrainState, Any], Any]]]:
  """Evaluations of what a policy answers: sampling, exact KL, the reward models' scores."""
  config = stage.config
  asked, data = config.evaluation, config.data
  if not asked.prompts or objective_of(config.objective).trains != 'policy':
    return {}
  sample, kl_of = make_sampler(parts), make_kl(parts)
  rows = abstract_sequences(data, asked.batch_size)

  def answers(state: TrainState, prompts: Any) -> Any:
    return sample(whole(state), prompts, state.stream(prng.Stream.EVALUATION))[0]

  def kl(state: TrainState, rows: Any) -> Any:
    return kl_of(whole(state), {'policy': parts.reference}, rows)

  def scores(_: TrainState, rows: Any) -> Any:
    return _pay(list(_judges(stage, frozen).values()), rows).scores

  found: dict[str, tuple[Any, Callable[[TrainState, Any], Any]]] = {
    'answers': (abstract_prompts(data, asked.batch_size), answers)
  }
  if 'reference' in frozen:
    found['KL'] = (rows, kl)
  if stage.reward_models:
    found['scores'] = (rows, scores)
  return found


def _judges(stage: PlannedStage, frozen: Mapping[str, Any]) -> dict[str, FrozenRewardModel]:
  return {
    role: FrozenRewardModel((run.model,), (frozen[role],), run.by_token)
    for role, run in stage.reward_models.items()
  }


def _online(stage: PlannedStage, frozen: Mapping[str, Any]) -> _Pieces:
  """Sampling, scoring by every model, and the update on what the objective makes of it."""
  config = stage.config
  parts = stage.parts(frozen.get('reference'))
  rewards = _judges(stage, frozen)
  learner = online.make_learner(parts, rewards.get('reward_model'))
  sample = make_sampler(parts, demands_of(config.objective).samples)
  cut = online.make_cut(parts)
  read, complete = online.make_reader(parts, learner.policy), online.make_completion(parts)
  from_reference = demands_of(config.objective).sampler == 'reference'
  reading = Reading(config.accumulation, shared_samples(config, row_devices(stage.mesh)))

  def whole(state: TrainState) -> Any:
    return learner.trees.whole(state.params)

  def params_of(state: TrainState) -> Any:
    return {'policy': parts.reference} if from_reference else whole(state)

  def generation(state: TrainState, prompts: Any) -> Any:
    drawn = sample(params_of(state), prompts, state.stream(prng.Stream.SAMPLING))
    return cut(Generated(drawn[0], drawn[1].finished, drawn[1].logprobs))

  def scoring(state: TrainState, inputs: Any) -> Any:
    sampled, sequences = inputs
    scored = _pay(list(rewards.values()), sequences, reading)
    judged = read(params_of(state), parts.reference, sampled.sequences)
    return complete(state.carry, sampled, judged, scored)[0].batch

  evaluations = _of_policies(stage, parts, frozen, whole)
  return _Pieces(learner.trainer, {'generation': generation, 'scoring': scoring}, evaluations)


def _pay(
  models: list[FrozenRewardModel], sequences: Sequences, reading: Reading = PLAINLY
) -> Scored:
  """The sum of what all reward models say; rewards computed on the host cost devices nothing."""
  found = [make_score(model, reading)(sequences) for model in models]
  if not found:
    return Scored(jnp.zeros(sequences.response.shape[0]))
  token = [scored.token_rewards for scored in found if scored.token_rewards is not None]
  return Scored(
    jnp.stack([scored.scores for scored in found]).sum(0),
    jnp.stack(token).sum(0) if token else None,
  )
