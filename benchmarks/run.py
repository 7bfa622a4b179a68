"""Times one job: tokens a second, seconds a step, and how much of the machine's ceiling that is.

  python -m benchmarks.run --job=dpo --size=SMALL
  python -m benchmarks.run --job=ppo_iteration --size=SMALL --repeats=9 --json=ppo.json

Jobs are stages like any other, on made-up text without padding, of a Llama-style decoder (SMALL
4.2M parameters, BASE 134M); a step is all that the training loop does for one: the batch, scoring
and rollouts, the update. Excluded are loading, and the first step, which compiles (its seconds are
stated). The ceiling is a plain product of large matrices, measured in the same process. Other work
on the machine makes every number meaningless: its load is stated too.
"""

import dataclasses
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import flags

from benchmarks import measuring, workloads
from experiments import cli
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

JOB = flags.DEFINE_enum('job', None, list(workloads.JOBS), 'What is timed.', required=True)
SIZE = flags.DEFINE_enum('size', 'SMALL', list(workloads.SIZES), 'Of the decoder.')
DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of computation.')
REPEATS = flags.DEFINE_integer('repeats', 5, 'Steps that are timed, after the first.', 1)
FOLDER = flags.DEFINE_string(
  'folder', None, 'Keeps data and parents for the next time; default: a temporary one.'
)
JSON = flags.DEFINE_string('json', None, 'A file for the numbers.')


def stage(folder: pathlib.Path) -> ExperimentConfig:
  """The job's stage, its data and its parents, which are trained for a step."""
  size = SIZE.value
  folder = folder / size
  tokenizer = folder / 'tokenizer'
  if not (tokenizer / 'tokenizer.json').exists():
    known = workloads.words(size)
    tokenizers.train('word', known, workloads.SIZES[size].vocab_size).save(tokenizer)

  def config(job: str) -> ExperimentConfig:
    return workloads.config(job, size, folder, tokenizer, dtype=DTYPE.value)

  wanted = workloads.JOBS[JOB.value].parents
  for role, job in (('policy', 'sft'), ('reward_model', 'reward')):
    if role in wanted and not (folder / role / 'result.json').exists():
      parent = config(job)
      parent.steps = 1
      run_stage(parent, folder / role, root=folder)
  return config(JOB.value)


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


def work(config: ExperimentConfig, model: Any) -> tuple[int, float]:
  """Tokens and operations of a step."""
  job = workloads.JOBS[JOB.value]
  demands = demands_of(config.objective)
  if JOB.value == 'generate':
    return job.rows * job.response, generation_flops(
      model, Rows(job.rows, job.prompt, job.response)
    )
  texts = 2 if JOB.value in ('reward', 'dpo', 'dpo_cached') else demands.samples
  rows = Rows(job.rows * texts, job.prompt, job.response)
  scored = JOB.value != 'reward'
  flops = demands.epochs * training_flops(model, rows, scored=scored)
  if JOB.value == 'dpo':
    flops += forward_flops(model, rows)
  if 'iteration' in JOB.value:
    # Sampling, the reference and the reward model; the policy's own values come with sampling.
    flops += generation_flops(model, rows) + forward_flops(model, rows)
    flops += forward_flops(model, rows, scored=False)
    return rows.number * job.response, flops
  return rows.number * (job.prompt + job.response), flops


def measure(folder: pathlib.Path) -> dict[str, Any]:
  """All numbers of a job."""
  config = stage(folder)
  load = os.getloadavg()[0]
  resolved = resolve(config, folder)
  start = time.perf_counter()
  built = build(resolved.config, resolved.parents, resolved.feedback)
  loading = time.perf_counter() - start
  with jax.set_mesh(built.mesh):
    if JOB.value == 'generate':
      feedback = resolved.feedback
      assert isinstance(feedback, Feedback), 'jobs are of texts'
      parts = load_parts(resolved.config, resolved.parents, feedback)
      step = sampling(config, built, parts)
    else:
      step = training(built)
    first = measuring.timed(step, 1)[0]
    seconds = measuring.timed(step, REPEATS.value)
  tokens, flops = work(config, built.model)
  median = measuring.spread(seconds)['median']
  top = measuring.ceiling(DTYPE.value)
  return {
    'job': JOB.value,
    'size': SIZE.value,
    'dtype': DTYPE.value,
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


def main() -> int:
  out = cli.json_path(JSON.value)
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(FOLDER.value or temporary)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = measure(folder)
  seconds = numbers['seconds']
  print(
    f'{numbers["job"]} {numbers["size"]}: {seconds["median"]:.3f} s a step '
    f'({seconds["least"]:.3f} to {seconds["most"]:.3f}), '
    f'{numbers["tokens_per_second"]:,.0f} tokens/s, {numbers["utilisation"]:.0%} of '
    f'{numbers["ceiling_flops_per_second"] / 1e9:,.0f} GFLOP/s; '
    f'first step {numbers["first_step_seconds"]:.1f} s; load before {numbers["load_before"]:.1f}'
  )
  if out is not None:
    out.write_text(json.dumps(numbers, indent=1) + '\n', encoding='utf-8')
  sys.stdout.flush()
  return cli.DONE


if __name__ == '__main__':
  cli.run(main)
