"""Times a job, beside a peer if there is one, and holds it against the machine's limits."""

import multiprocessing
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from benchmarks import checkpoints, measuring, peer, profiling, startup, workloads
from benchmarks.loops import Loop, Sampling, Training
from rlhf_jax import provenance
from rlhf_jax.common.errors import UserError
from rlhf_jax.common.types import Prompts
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.data import tokenizers
from rlhf_jax.feedback.dataset import Feedback
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.objectives import demands_of
from rlhf_jax.planning.arithmetic import (
  Rows,
  decoding_bytes,
  forward_flops,
  generation_flops,
  training_flops,
)
from rlhf_jax.recipes import Built, build
from rlhf_jax.recipes.parts import load_parts
from rlhf_jax.recipes.policies import make_sampler
from rlhf_jax.stages import resolve, run_stage

# Those that do nothing but sample, and those whose steps begin with it.
SAMPLING = ('generate', 'decode')
ROLLOUTS = ('ppo_iteration', 'ppo_separate', 'grpo_iteration')
# All jobs: those of one stage, and what comes before and after stages.
NAMES = (*workloads.JOBS, 'load_export', 'compile')
# Steps whose insides are looked into, at most: traces are large, most of all those of sampling.
_PROFILED = 3
_SAMPLED = 2
# Operations that are kept of a profile.
_COSTLIEST = 15


class Timing(NamedTuple):
  """What is timed, and how often.

  Attributes:
    job: one of NAMES.
    size: one of workloads.SIZES.
    dtype: of computation.
    repeats: steps that are timed, after the first.
  """

  job: str
  size: str
  dtype: str
  repeats: int


class Ready(NamedTuple):
  """A job that is loaded.

  Attributes:
    config: its stage.
    built: what that was built to.
    loop: its steps; the first compiles.
    parameters: of the model that is trained, or sampled from.
    loading: seconds it took, after the data were read.
  """

  config: ExperimentConfig
  built: Built
  loop: Loop
  parameters: int
  loading: float


def tokenizer_of(size: str, folder: pathlib.Path) -> pathlib.Path:
  """A folder with the size's vocabulary, made if it is missing."""
  tokenizer = folder / 'tokenizer'
  if not (tokenizer / 'tokenizer.json').exists():
    known = workloads.words(size)
    tokenizers.train('word', known, workloads.SIZES[size].vocab_size).save(tokenizer)
  return tokenizer


def stage(timing: Timing, folder: pathlib.Path) -> ExperimentConfig:
  """The job's stage, its data and its parents, which are trained for a step."""
  size = timing.size
  folder = folder / size
  tokenizer = tokenizer_of(size, folder)

  def config(job: str) -> ExperimentConfig:
    return workloads.config(job, size, folder, tokenizer, dtype=timing.dtype)

  wanted = workloads.job_of(timing.job, size).parents
  for role, job in (('policy', 'sft'), ('reward_model', 'reward')):
    if role in wanted and not (folder / role / 'result.json').exists():
      parent = config(job)
      parent.steps = 1
      run_apart(parent, folder / role, folder)
  return config(timing.job)


def run_apart(config: ExperimentConfig, workdir: pathlib.Path, root: pathlib.Path) -> None:
  """Runs a stage in a process of its own: its memory and compilation are none of the job's.

  Raises UserError if it fails; that process says why.
  """
  process = multiprocessing.get_context('spawn').Process(
    target=run_stage, args=(config, workdir), kwargs={'root': root}
  )
  process.start()
  process.join()
  if process.exitcode:
    raise UserError(f'{config.name}: its run in {workdir} failed; what it said is above.')


def count(by_role: Mapping[str, Any]) -> int:
  """The parameters of what is trained, or sampled from, as transformers has them."""
  if 'policy' in by_role:
    return sum(leaf.size for leaf in jax.tree.leaves(by_role['policy']))
  # The trunk of a reward model keeps the read-out of the policy it came from, which it never reads.
  trunk = {**by_role['reward_model']['trunk'], 'unembedding': ()}
  return sum(leaf.size for leaf in jax.tree.leaves({**by_role['reward_model'], 'trunk': trunk}))


def prepare(timing: Timing, folder: pathlib.Path) -> Ready:
  """Loads a job of one stage."""
  config = stage(timing, folder)
  resolved = resolve(config, folder)
  start = time.perf_counter()
  built = build(resolved.config, resolved.parents, resolved.feedback)
  with jax.set_mesh(built.mesh):
    state = built.recipe.init()
    parameters = count(state.by_role)
    loop: Loop
    if timing.job in SAMPLING:
      feedback = resolved.feedback
      assert isinstance(feedback, Feedback), 'jobs are of texts'
      parts = load_parts(resolved.config, resolved.parents, feedback)
      loop = sampling(config, built, parts, state.by_role)
    else:
      loop = Training(built.recipe, state)
  return Ready(config, built, loop, parameters, time.perf_counter() - start)


def sampling(config: ExperimentConfig, built: Built, parts: Any, params: Any) -> Sampling:
  """Rounds of sampling from the parameters of a policy."""
  batch = built.recipe.batch(0)
  prompts = Prompts(batch.prompt, batch.prompt_mask, jax.numpy.arange(config.batch_size))
  return Sampling(make_sampler(parts), params, prompts)


def timed(ready: Ready) -> measuring.Step:
  """The job's step, which says how long it took."""

  def step() -> dict[str, float]:
    with jax.set_mesh(ready.built.mesh):
      return {'step': measuring.timed(ready.loop.step, 1)[0]}

  return step


def rows_of(name: str, config: ExperimentConfig) -> Rows:
  """The sequences of a step, and how many of them are read behind one prompt."""
  samples = demands_of(config.objective).samples
  copies = 2 if name in ('reward', 'dpo', 'dpo_cached') else samples
  shared = copies if config.data.share_prompts else 1
  data = config.data
  return Rows(config.batch_size * copies, data.prompt_length, data.response_length, shared)


def work(name: str, config: ExperimentConfig, model: Any) -> tuple[int, float]:
  """Tokens and operations of a step; a prompt's tokens count with each of its responses."""
  demands, rows = demands_of(config.objective), rows_of(name, config)
  if name in SAMPLING:
    return rows.number * rows.response, generation_flops(model, rows)
  flops = demands.epochs * training_flops(model, rows, scored=name != 'reward')
  if name == 'dpo':
    flops += forward_flops(model, rows)
  if name not in ROLLOUTS:
    return rows.number * (rows.prompt + rows.response), flops
  # Sampling, the reference, and the reward model.
  flops += generation_flops(model, rows) + forward_flops(model, rows)
  flops += forward_flops(model, rows, scored=False)
  # The policy reads its samples again, for log-probs and for values of its trunk.
  scored = config.rollout.old_logprobs == 'trainer'
  if scored or demands.value == 'shared':
    flops += forward_flops(model, rows, scored=scored)
  if demands.value == 'separate':
    flops += forward_flops(model, rows, scored=False)
    flops += demands.epochs * training_flops(model, rows, scored=False)
  return rows.number * rows.response, flops


def measure(
  timing: Timing,
  folder: pathlib.Path,
  other: Callable[[Mapping[str, Any]], peer.Peer] | None = None,
  traces: pathlib.Path | None = None,
) -> dict[str, Any]:
  """All numbers of a job.

  Args:
    timing: what is timed.
    folder: keeps data and parents for the next time.
    other: starts a peer that does the job of a `workloads.peer_spec`, a step of it after each of
      ours; None: ours alone.
    traces: a folder for the trace of a few steps, whose costliest operations are then among the
      numbers; of jobs of one stage. None: the trace is not kept.
  """
  job, size, place = timing.job, timing.size, folder / timing.size
  tokenizer = tokenizer_of(size, place)

  def start(spec: Mapping[str, Any]) -> peer.Start | None:
    return None if other is None else lambda: other(spec)

  if job == 'load_export':
    checkpoint = checkpoints.make(size, timing.dtype, place, tokenizer)
    spec = {'job': job, 'checkpoint': str(checkpoint.resolve()), 'threads': measuring.threads()}
    numbers = checkpoints.measure(checkpoint, timing.dtype, timing.repeats, start(spec))
  elif job == 'compile':
    stage(timing._replace(job='sft'), folder)
    command = startup.command(size, timing.dtype, str(folder))
    spec = workloads.peer_spec('sft', size, tokenizer)
    numbers = startup.measure(command, timing.repeats, start(spec))
  else:
    numbers = steps(timing, folder, start(workloads.peer_spec(job, size, tokenizer)), traces)
  where = {'revision': provenance.git_revision(), **measuring.machine()}
  return {**timing._asdict(), **numbers, **where}


def steps(
  timing: Timing, folder: pathlib.Path, start: peer.Start | None, traces: pathlib.Path | None
) -> dict[str, Any]:
  """The numbers of a job of one stage."""
  stage(timing, folder)
  with measuring.compiling() as compiled:
    ready = prepare(timing, folder)
    found = peer.contest(timed(ready), start, timing.repeats)
  numbers = found.numbers()
  if found.peer is not None:
    theirs = found.peer['loaded']['parameters']
    assert abs(theirs - ready.parameters) <= 1e-3 * theirs, (theirs, ready.parameters)
  return {
    **numbers,
    **limits(timing, ready, numbers['seconds']['step']['ours']['median']),
    **insides(timing, ready, traces),
    'parameters': ready.parameters,
    'loading_seconds': ready.loading,
    'compile_seconds': sum(compiled),
  }


def limits(timing: Timing, ready: Ready, seconds: float) -> dict[str, Any]:
  """How much a step does, and how near that comes to what the devices of its mesh could do."""
  mesh, model = ready.built.mesh, ready.built.model
  assert isinstance(model, ModelConfig), 'jobs are of texts'
  tokens, flops = work(timing.job, ready.config, model)
  ceiling = measuring.ceiling(timing.dtype) * mesh.size
  numbers = {
    'tokens_per_second': tokens / seconds,
    'flops': flops,
    'ceiling_flops_per_second': ceiling,
    'utilisation': flops / seconds / ceiling,
  }
  if timing.job not in SAMPLING:
    return numbers
  # Both of one device.
  read = decoding_bytes(model, rows_of(timing.job, ready.config), dict(mesh.shape))
  bandwidth = measuring.bandwidth()
  return {
    **numbers,
    'decoding_bytes': read,
    'bandwidth_bytes_per_second': bandwidth,
    'bandwidth_share': read / seconds / bandwidth,
  }


def insides(timing: Timing, ready: Ready, traces: pathlib.Path | None) -> dict[str, Any]:
  """What is between the start and the end of a step."""
  loop, most = ready.loop, _SAMPLED if timing.job in SAMPLING else _PROFILED
  steps = min(timing.repeats, most)
  numbers: dict[str, Any] = {}
  with jax.set_mesh(ready.built.mesh), tempfile.TemporaryDirectory() as temporary:
    if timing.job in ROLLOUTS:
      assert isinstance(loop, Training)
      parts = [loop.parts() for _ in range(steps)]
      numbers['parts_seconds'] = {
        name: statistics.median(each[name] for each in parts) for name in parts[0]
      }
    loop.loop(1)  # compiles what reads metrics
    seen = profiling.profile(lambda: loop.loop(steps), traces or pathlib.Path(temporary))
  if seen.idle_share is not None:
    numbers['idle_share'] = seen.idle_share
  if traces is not None:
    costliest = seen.operations[:_COSTLIEST]
    numbers['operations'] = [
      {**each._asdict(), 'seconds': each.seconds / steps} for each in costliest
    ]
  return numbers
