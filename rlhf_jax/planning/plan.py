"""A plan: memory, operations and traffic of a stage on a mesh, as numbers to print or to keep."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.objectives import demands_of, objective_of
from rlhf_jax.planning import arithmetic
from rlhf_jax.planning.accelerators import ACCELERATORS
from rlhf_jax.planning.arithmetic import Rows
from rlhf_jax.planning.estimates import Estimate, estimate
from rlhf_jax.planning.programs import Compiled, CompiledProgram, compile_stage, device_bytes
from rlhf_jax.planning.stage import PlannedStage
from rlhf_jax.recipes.engines import sampling_mesh
from rlhf_jax.recipes.sharing import shared_rows, shared_samples
from rlhf_jax.sharding.mesh import row_devices
from rlhf_jax.sharding.rules import relaid

# Of a device's memory, what programs can have: the rest goes to the runtime, to buffers of the
# collectives, and to gaps between arrays.
USABLE = 0.92


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a step of a stage takes; bytes and operations are numbers of one device unless said.

  Attributes:
    name: of the stage.
    mesh: sizes of the axes.
    resident: bytes by role of what stays on a device between programs.
    parameters: how many numbers each role has, over all devices.
    gradients: bytes of the gradients while an update runs, a part of its temporaries.
    cache: bytes of the key-value cache while responses are sampled, by a step or an evaluation,
      whichever has more, likewise; 0: none are.
    sampling_weights: bytes of the weights that sampling reads, in the compute type, and of their
      copy on a mesh of its own, likewise.
    decoded: bytes that sampling reads of a device's memory.
    estimates: of what else the named accelerators hold.
    programs: what the compiler made of each program of a step.
    evaluations: and of evaluations along the run.
    flops: operations of a step over all devices, by program and role.
    notes: what to keep in mind.
  """

  name: str
  mesh: dict[str, int]
  resident: dict[str, int]
  parameters: dict[str, int]
  gradients: int
  cache: int
  sampling_weights: float
  decoded: float
  estimates: dict[str, Estimate]
  programs: dict[str, CompiledProgram]
  evaluations: dict[str, CompiledProgram]
  flops: dict[str, dict[str, float]]
  notes: list[str]

  @property
  def devices(self) -> int:
    """How many there are."""
    product = 1
    for size in self.mesh.values():
      product *= size
    return product

  @property
  def held(self) -> int:
    """Bytes of everything resident."""
    return sum(self.resident.values())

  @property
  def _all(self) -> list[CompiledProgram]:
    return [*self.programs.values(), *self.evaluations.values()]

  @property
  def compiled_peak(self) -> int:
    """Bytes at the worst moment, with temporaries as compiled here, for CPUs."""
    return self.held + max(p.temporary + p.extra for p in self._all)

  def estimated_peak(self, accelerator: str) -> int:
    """Bytes at the worst moment, with the estimated activations of a named accelerator."""
    extra, estimate = max(p.extra for p in self._all), self.estimates[accelerator]
    update = self.gradients + sum(each.total for each in estimate.activations.values())
    reading = max(estimate.reading.values(), default=0.0)
    return int(self.held + extra + max(update, reading, self.cache + self.sampling_weights))


def make_plan(stage: PlannedStage, say: Callable[[str], None] = lambda _: None) -> Plan:
  """Compiles a stage's programs and counts; `say` hears of progress."""
  compiled = compile_stage(stage, say)
  mesh = {name: int(size) for name, size in stage.mesh.shape.items()}
  decoders = _trained_decoders(stage, compiled)
  rows = _rows(stage, compiled)
  flops = _flops(stage, compiled, decoders, rows)
  sampler = stage.config.generation.sampling(stage.model)
  accumulated = 2 if stage.config.accumulation > 1 else 1
  online = 'generation' in compiled.programs
  elsewhere = sampling_mesh(stage.config, stage.model, stage.mesh) if online else None
  copied = 0 if elsewhere is None else device_bytes(relaid(_sampler(stage, compiled), elsewhere))
  sampling = mesh if elsewhere is None else dict(elsewhere.shape)
  sampled = [(rows['sampled'], demands_of(stage.config.objective).samples)] if online else []
  if 'answers' in compiled.evaluations:
    answers = rows['sampled']._replace(number=stage.config.evaluation.batch_size)
    sampled.append((answers, 1))
  return Plan(
    name=stage.config.name,
    mesh=mesh,
    resident=_resident(stage, compiled),
    parameters={
      role: sum(leaf.size for leaf in jax.tree.leaves(tree))
      for role, tree in {**compiled.state.params, **compiled.frozen}.items()
    },
    gradients=accumulated * device_bytes(compiled.state.params),
    cache=max(
      (
        arithmetic.sampling_cache_bytes(
          sampler, each, copies, stage.config.generation.slots, sampling
        )
        for each, copies in sampled
      ),
      default=0,
    ),
    sampling_weights=(
      copied
      + arithmetic.sampling_weights(
        sampler, sampling, gathered=stage.config.generation.weights == 'gathered'
      )
      if sampled
      else 0.0
    ),
    decoded=arithmetic.decoding_bytes(sampler, rows['sampled'], sampling) if online else 0.0,
    estimates={
      name: estimate(stage, compiled, decoders, rows, set(flops.get('scoring', ())), row)
      for name, row in ACCELERATORS.items()
    },
    programs=compiled.programs,
    evaluations=compiled.evaluations,
    flops=flops,
    notes=stage.notes + _notes(stage, compiled),
  )


def _sampler(stage: PlannedStage, compiled: Compiled) -> list[Any]:
  """The trees of who samples."""
  config, policy = stage.config, compiled.state.params['policy']
  if demands_of(config.objective).sampler == 'reference':
    return [compiled.frozen['reference']]
  return [policy] if config.adapter.method == 'none' else [policy, compiled.frozen['reference']]


def _resident(stage: PlannedStage, compiled: Compiled) -> dict[str, int]:
  state, copied = compiled.state, stage.value_layers()
  trees = {
    **state.params,
    'optimizer': state.opt_state,
    **state.targets,
    'other state': (state.step, state.key, state.carry),
    **{f'{role} (frozen)': tree for role, tree in compiled.frozen.items()},
    **({'value_trunk, lower layers (frozen)': copied} if copied else {}),
  }
  return {role: device_bytes(tree) for role, tree in trees.items()}


def _trained_decoders(stage: PlannedStage, compiled: Compiled) -> dict[str, ModelConfig]:
  """The decoders that gradients go through, by role."""
  params = compiled.state.params
  decoders = {role: stage.model for role in ('policy', 'reward_model') if role in params}
  if 'value_trunk' in params:
    reward = stage.reward_models.get('reward_model')
    same = demands_of(stage.config.objective).value != 'reward_model' or reward is None
    decoders['value_trunk'] = stage.model if same else reward.model  # type: ignore[union-attr]
  return decoders


def _rows(stage: PlannedStage, compiled: Compiled) -> dict[str, Rows]:
  """The sequences of an update, those that one device reads at a time, and those sampled."""
  config = stage.config
  demands = demands_of(config.objective)
  data = config.data
  updated = arithmetic.sequences_in(compiled.batch, data.prompt_length)
  devices = row_devices(stage.mesh)
  shares = demands.minibatches * config.accumulation * devices
  if objective_of(config.objective).data == 'prompts':
    updated = updated._replace(shared=max(updated.shared, shared_rows(config, devices)))
  sampled = Rows(
    config.batch_size * demands.samples,
    data.prompt_length,
    data.response_length,
    shared_samples(config, devices),
  )
  device = updated._replace(number=max(updated.number // shares, 1))
  return {'updated': updated, 'device': device, 'sampled': sampled}


def _flops(
  stage: PlannedStage,
  compiled: Compiled,
  decoders: dict[str, ModelConfig],
  rows: dict[str, Rows],
) -> dict[str, dict[str, float]]:
  demands = demands_of(stage.config.objective)
  online = 'generation' in compiled.programs
  read = rows['sampled'] if online else rows['updated']
  flops: dict[str, dict[str, float]] = {}
  if online:
    flops['generation'] = {'policy': arithmetic.generation_flops(stage.model, read)}
  if 'scoring' in compiled.programs:
    scoring = flops['scoring'] = {}
    if online or demands.prepares == 'reads':
      trusted = online and stage.config.rollout.old_logprobs == 'sampler'
      for role, model in decoders.items():
        if role == 'policy' and trusted and demands.value != 'shared':
          continue
        asked = role == 'policy' and not trusted
        scoring[role] = arithmetic.forward_flops(model, read, scored=asked)
    for role in compiled.frozen:
      whole = role == 'reference'
      if not whole and not online:  # evaluations alone ask it
        continue
      model = stage.model if whole else stage.reward_models[role].model
      scoring[role] = arithmetic.forward_flops(model, read, scored=whole)
  flops['update'] = {
    role: demands.epochs
    * arithmetic.training_flops(
      model, rows['updated'], stage.config.adapter, scored=role == 'policy'
    )
    for role, model in decoders.items()
  }
  return flops


def _notes(stage: PlannedStage, compiled: Compiled) -> list[str]:
  notes = [
    'Temporaries and traffic are those of a compilation for CPUs, which computes bfloat16 in '
    'float32 (both up to twice as large), keeps attention scores whole, and reduces gradients '
    'whole before it keeps a part (up to twice the traffic of a reduce-scatter).',
    "XLA's own count of operations has the body of every loop once: scanned layers, microbatches.",
  ]
  if any(program.read.unknown_loops for program in compiled.programs.values()):
    notes.append('Responses are taken to be sampled to their full length.')
  if objective_of(stage.config.objective).data == 'rankings':
    notes.append('Rankings are taken to have 4 responses each.')
  if stage.config.data.pack:
    notes.append('Packed texts are planned as one a row, the most that they may take.')
  rewards = stage.config.rollout.rewards
  hosted = [r.source for r in rewards if r.init is None and r.source != 'reward_model']
  if hosted and 'generation' in compiled.programs:
    notes.append(f'Rewards of {", ".join(hosted)} are computed on the host and not planned.')
  return notes


def as_json(plan: Plan) -> dict[str, Any]:
  """The plan as plain values."""
  return {
    'name': plan.name,
    'mesh': plan.mesh,
    'devices': plan.devices,
    'bytes_per_device': {
      'resident': plan.resident,
      'gradients': plan.gradients,
      'kv_cache': plan.cache,
      'sampling_weights': plan.sampling_weights,
      'read_while_sampling': plan.decoded,
      'peak_compiled_for_cpu': plan.compiled_peak,
      'estimated': {
        name: {
          'activations': {role: part._asdict() for role, part in each.activations.items()},
          'reading': each.reading,
          'peak': plan.estimated_peak(name),
        }
        for name, each in plan.estimates.items()
      },
    },
    'attention': {name: each.attention for name, each in plan.estimates.items()},
    'objections': {name: each.objection for name, each in plan.estimates.items()},
    'parameters': plan.parameters,
    'flops_per_step': plan.flops,
    'programs': {name: _program_json(program) for name, program in plan.programs.items()},
    'evaluations': {name: _program_json(program) for name, program in plan.evaluations.items()},
    'notes': plan.notes,
  }


def _program_json(program: CompiledProgram) -> dict[str, Any]:
  return {
    'temporary_bytes': program.temporary,
    'argument_and_result_bytes': program.extra,
    'xla_flops_loops_once': program.flops,
    'compile_seconds': program.seconds,
    'collectives': [
      {**dataclasses.asdict(each), 'total': each.total}
      for each in sorted(program.read.collectives, key=lambda each: -each.total)
    ],
    'largest_arrays': [dataclasses.asdict(each) for each in program.read.arrays[:20]],
  }
