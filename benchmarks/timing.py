"""Times a job, beside a peer if there is one, and holds it against the machine's ceiling."""

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from benchmarks import checkpoints, measuring, peer, startup, workloads
from benchmarks.idling import idle_share
from rlhf_jax import provenance
from rlhf_jax.common import prng
from rlhf_jax.common.types import Prompts
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.data import tokenizers
from rlhf_jax.feedback.dataset import Feedback
from rlhf_jax.objectives import demands_of
from rlhf_jax.planning.arithmetic import Rows, forward_flops, generation_flops, training_flops
from rlhf_jax.recipes import Built, build
from rlhf_jax.recipes.parts import load_parts
from rlhf_jax.recipes.policies import make_sampler
from rlhf_jax.stages import resolve, run_stage
from rlhf_jax.training.state import TrainState

# Those whose steps begin with sampling.
ROLLOUTS = ('ppo_iteration', 'ppo_separate', 'grpo_iteration')
# All jobs: those of one stage, and what comes before and after stages.
NAMES = (*workloads.JOBS, 'load_export', 'compile')


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
    step: does one step; its first call compiles.
    parameters: of the model that is trained, or sampled from.
    loading: seconds it took, after the data were read.
  """

  config: ExperimentConfig
  built: Built
  step: Callable[[], Any]
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

  wanted = workloads.job_of(timing.job).parents
  for role, job in (('policy', 'sft'), ('reward_model', 'reward')):
    if role in wanted and not (folder / role / 'result.json').exists():
      parent = config(job)
      parent.steps = 1
      run_stage(parent, folder / role, root=folder)
  return config(timing.job)


def training(built: Built, state: TrainState) -> Callable[[], Any]:
  """One step of the loop after the other, from a state that it uses up."""
  recipe, number = built.recipe, 0

  def step() -> Any:
    nonlocal state, number
    prepared = recipe.prepare(state, recipe.batch(number))
    state, metrics = recipe.update(dataclasses.replace(state, carry=prepared.carry), prepared.batch)
    number += 1
    return metrics

  return step


def sampling(config: ExperimentConfig, built: Built, parts: Any, params: Any) -> Callable[[], Any]:
  """One round of sampling after the other, from the parameters of a policy."""
  sample = jax.jit(make_sampler(parts))
  batch = built.recipe.batch(0)
  prompts = Prompts(batch.prompt, batch.prompt_mask, jax.numpy.arange(config.batch_size))
  number = 0

  def step() -> Any:
    nonlocal number
    number += 1
    return sample(params, prompts, prng.base_key(number))

  return step


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
    if timing.job == 'generate':
      feedback = resolved.feedback
      assert isinstance(feedback, Feedback), 'jobs are of texts'
      parts = load_parts(resolved.config, resolved.parents, feedback)
      step = sampling(config, built, parts, state.by_role)
    else:
      step = training(built, state)
  return Ready(config, built, step, parameters, time.perf_counter() - start)


def timed(ready: Ready) -> measuring.Step:
  """The job's step, which says how long it took."""

  def step() -> dict[str, float]:
    with jax.set_mesh(ready.built.mesh):
      return {'step': measuring.timed(ready.step, 1)[0]}

  return step


def work(name: str, config: ExperimentConfig, model: Any) -> tuple[int, float]:
  """Tokens and operations of a step; a prompt's tokens count with each of its responses."""
  job = workloads.JOBS[name]
  demands = demands_of(config.objective)
  if name == 'generate':
    return job.rows * job.response, generation_flops(
      model, Rows(job.rows, job.prompt, job.response)
    )
  pairs = name in ('reward', 'dpo', 'dpo_cached')
  shared = (2 if pairs else demands.samples) if config.data.share_prompts else 1
  rows = Rows(job.rows * (2 if pairs else demands.samples), job.prompt, job.response, shared)
  scored = name != 'reward'
  flops = demands.epochs * training_flops(model, rows, scored=scored)
  if name == 'dpo':
    flops += forward_flops(model, rows)
  if name in ROLLOUTS:
    # Sampling, the reference and the reward model; the policy's own values come with sampling.
    flops += generation_flops(model, rows) + forward_flops(model, rows)
    flops += forward_flops(model, rows, scored=False)
    if demands.value == 'separate':
      flops += forward_flops(model, rows, scored=False)
      flops += demands.epochs * training_flops(model, rows, scored=False)
    return rows.number * job.response, flops
  return rows.number * (job.prompt + job.response), flops


def measure(timing: Timing, folder: pathlib.Path, python: str | None = None) -> dict[str, Any]:
  """All numbers of a job.

  Args:
    timing: what is timed.
    folder: keeps data and parents for the next time.
    python: the interpreter of an environment that has TRL, which then does the same job, a step of
      it after each of ours; None: ours alone.
  """
  job, size = timing.job, timing.size
  load, place = os.getloadavg()[0], folder / size
  tokenizer = tokenizer_of(size, place)

  def start(spec: Mapping[str, Any]) -> peer.Start | None:
    return None if python is None else lambda: peer.trl(python, spec)

  if job == 'load_export':
    checkpoint = checkpoints.make(size, place, tokenizer)
    spec = {'job': job, 'checkpoint': str(checkpoint.resolve()), 'threads': measuring.threads()}
    numbers = checkpoints.measure(checkpoint, timing.repeats, start(spec))
  elif job == 'compile':
    stage(timing._replace(job='sft'), folder)
    command = startup.command(size, timing.dtype, str(folder))
    spec = workloads.peer_spec('sft', size, tokenizer)
    numbers = startup.measure(command, timing.repeats, start(spec))
  else:
    numbers = steps(timing, folder, start(workloads.peer_spec(job, size, tokenizer)))
  where = {'revision': provenance.git_revision(), **measuring.machine()}
  return {**timing._asdict(), **numbers, 'load_before': load, **where}


def steps(timing: Timing, folder: pathlib.Path, start: peer.Start | None) -> dict[str, Any]:
  """The numbers of a job of one stage."""
  with measuring.compiling() as compiled:
    ready = prepare(timing, folder)
    found = peer.contest(timed(ready), start, timing.repeats)
  numbers = found.numbers()
  if found.peer is not None:
    theirs = found.peer['loaded']['parameters']
    assert abs(theirs - ready.parameters) <= 1e-3 * theirs, (theirs, ready.parameters)
  given = timing.job != 'generate' and timing.job not in ROLLOUTS
  idle = {'idle_share': idle_share(ready.built, timing.repeats)} if given else {}
  tokens, flops = work(timing.job, ready.config, ready.built.model)
  median = numbers['seconds']['step']['ours']['median']
  top = measuring.ceiling(timing.dtype)
  return {
    **numbers,
    **idle,
    'parameters': ready.parameters,
    'tokens_per_second': tokens / median,
    'flops': flops,
    'ceiling_flops_per_second': top,
    'utilisation': flops / median / top,
    'loading_seconds': ready.loading,
    'compile_seconds': sum(compiled),
  }
