"""Times a stage's steps, or its sampling, and holds them against the machine's ceiling."""

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from benchmarks import measuring, workloads
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


class Timing(NamedTuple):
  """What is timed, and how often.

  Attributes:
    job: one of workloads.JOBS.
    size: one of workloads.SIZES.
    dtype: of computation.
    repeats: steps that are timed, after the first.
  """

  job: str
  size: str
  dtype: str
  repeats: int


def stage(timing: Timing, folder: pathlib.Path) -> ExperimentConfig:
  """The job's stage, its data and its parents, which are trained for a step."""
  size = timing.size
  folder = folder / size
  tokenizer = folder / 'tokenizer'
  if not (tokenizer / 'tokenizer.json').exists():
    known = workloads.words(size)
    tokenizers.train('word', known, workloads.SIZES[size].vocab_size).save(tokenizer)

  def config(job: str) -> ExperimentConfig:
    return workloads.config(job, size, folder, tokenizer, dtype=timing.dtype)

  wanted = workloads.JOBS[timing.job].parents
  for role, job in (('policy', 'sft'), ('reward_model', 'reward')):
    if role in wanted and not (folder / role / 'result.json').exists():
      parent = config(job)
      parent.steps = 1
      run_stage(parent, folder / role, root=folder)
  return config(timing.job)


def training(built: Built) -> Callable[[], Any]:
  """One step of the loop after the other."""
  recipe = built.recipe
  state, number = recipe.init(), 0

  def step() -> Any:
    nonlocal state, number
    prepared = recipe.prepare(state, recipe.batch(number))
    state, metrics = recipe.update(dataclasses.replace(state, carry=prepared.carry), prepared.batch)
    number += 1
    return metrics

  return step


def sampling(config: ExperimentConfig, built: Built, parts: Any) -> Callable[[], Any]:
  """One round of sampling after the other, from the initial policy."""
  params = built.recipe.init().by_role
  sample = jax.jit(make_sampler(parts))
  batch = built.recipe.batch(0)
  prompts = Prompts(batch.prompt, batch.prompt_mask, jax.numpy.arange(config.batch_size))
  number = 0

  def step() -> Any:
    nonlocal number
    number += 1
    return sample(params, prompts, prng.base_key(number))

  return step


def work(name: str, config: ExperimentConfig, model: Any) -> tuple[int, float]:
  """Tokens and operations of a step."""
  job = workloads.JOBS[name]
  demands = demands_of(config.objective)
  if name == 'generate':
    return job.rows * job.response, generation_flops(
      model, Rows(job.rows, job.prompt, job.response)
    )
  texts = 2 if name in ('reward', 'dpo', 'dpo_cached') else demands.samples
  rows = Rows(job.rows * texts, job.prompt, job.response)
  scored = name != 'reward'
  flops = demands.epochs * training_flops(model, rows, scored=scored)
  if name == 'dpo':
    flops += forward_flops(model, rows)
  if 'iteration' in name:
    # Sampling, the reference and the reward model; the policy's own values come with sampling.
    flops += generation_flops(model, rows) + forward_flops(model, rows)
    flops += forward_flops(model, rows, scored=False)
    return rows.number * job.response, flops
  return rows.number * (job.prompt + job.response), flops


def measure(timing: Timing, folder: pathlib.Path) -> dict[str, Any]:
  """All numbers of a job."""
  config = stage(timing, folder)
  load = os.getloadavg()[0]
  resolved = resolve(config, folder)
  start = time.perf_counter()
  built = build(resolved.config, resolved.parents, resolved.feedback)
  loading = time.perf_counter() - start
  with jax.set_mesh(built.mesh):
    if timing.job == 'generate':
      feedback = resolved.feedback
      assert isinstance(feedback, Feedback), 'jobs are of texts'
      parts = load_parts(resolved.config, resolved.parents, feedback)
      step = sampling(config, built, parts)
    else:
      step = training(built)
    first = measuring.timed(step, 1)[0]
    seconds = measuring.timed(step, timing.repeats)
  tokens, flops = work(timing.job, config, built.model)
  median = measuring.spread(seconds)['median']
  top = measuring.ceiling(timing.dtype)
  return {
    'job': timing.job,
    'size': timing.size,
    'dtype': timing.dtype,
    'seconds': measuring.spread(seconds),
    'tokens_per_second': tokens / median,
    'flops': flops,
    'ceiling_flops_per_second': top,
    'utilisation': flops / median / top,
    'first_step_seconds': first,
    'loading_seconds': loading,
    'peak_bytes': measuring.peak_bytes(),
    'load_before': load,
    **measuring.machine(),
  }
