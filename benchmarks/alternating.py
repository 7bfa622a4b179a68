"""Two ways of the same stage, timed in turn."""

import dataclasses
import os
import pathlib
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import measuring
from benchmarks.timing import Timing, sampling, stage
from rlhf_jax.recipes import build
from rlhf_jax.recipes.parts import load_parts
from rlhf_jax.stages import resolve


class Ways(NamedTuple):
  """A stage in two ways.

  Attributes:
    job: one of workloads.JOBS or workloads.RAGGED.
    plain: fields of a section of its config.
    other: the same of the other way.
    steps: in a pass.
    section: the section.
    sampling: whether sampling alone is timed, not whole steps.
  """

  job: str
  plain: dict[str, Any]
  other: dict[str, Any]
  steps: int
  section: str = 'data'
  sampling: bool = False


_BUCKETS = dict(length_buckets=4, length_window=8)
WAYS = {
  'share_prompts': Ways('dpo', dict(share_prompts=False), dict(share_prompts=True), 2),
  'share_prompts_cached': Ways(
    'dpo_cached', dict(share_prompts=False), dict(share_prompts=True), 2
  ),
  'share_prompts_reward': Ways('reward', dict(share_prompts=False), dict(share_prompts=True), 2),
  'length_buckets': Ways('dpo_ragged', {}, _BUCKETS, 8),
  'length_buckets_sft': Ways('sft_ragged', {}, _BUCKETS, 8),
  'pack': Ways('sft_ragged', {}, dict(pack=True), 8),
  'pack_buckets': Ways('sft_ragged', {}, dict(pack=True, **_BUCKETS), 8),
  'share_prompts_grpo': Ways(
    'grpo_iteration', dict(share_prompts=False), dict(share_prompts=True), 1
  ),
  'slots': Ways('generate_ragged', {}, dict(slots=32), 1, 'generation', sampling=True),
}


class _Way:
  """A stage that makes the steps it is asked for, or only samples."""

  def __init__(self, ways: Ways, timing: Timing, folder: pathlib.Path, changes: dict[str, Any]):
    config = stage(timing, folder)
    section = dataclasses.replace(getattr(config, ways.section), **changes)
    setattr(config, ways.section, section)
    resolved = resolve(config, folder)
    built = build(resolved.config, resolved.parents, resolved.feedback)
    self.recipe, self.mesh = built.recipe, built.mesh
    with jax.set_mesh(self.mesh):
      self.state = self.recipe.init()
    self.sample = None
    if ways.sampling:
      parts = load_parts(resolved.config, resolved.parents, resolved.feedback)  # type: ignore[arg-type]
      self.sample = sampling(config, built, parts, self.state.by_role).step

  def seconds(self, step: int) -> tuple[float, float]:
    """How long a step takes, its batch included, and of how much processor time."""

    def make() -> Any:
      prepared = self.recipe.prepare(self.state, self.recipe.batch(step))
      state = dataclasses.replace(self.state, carry=prepared.carry)
      self.state, metrics = self.recipe.update(state, prepared.batch)
      return self.state, metrics

    with jax.set_mesh(self.mesh):
      before = time.process_time()
      seconds = measuring.timed(make if self.sample is None else self.sample, 1)[0]
      return seconds, time.process_time() - before


def compare(ways: Ways, size: str, dtype: str, passes: int, folder: pathlib.Path) -> dict[str, Any]:
  """Seconds of each pass both ways, and how many times faster the other is."""
  timing = Timing(ways.job, size, dtype, passes)
  both = [_Way(ways, timing, folder, changes) for changes in (ways.plain, ways.other)]
  found = [
    [[way.seconds(step) for way in both] for step in range(ways.steps)] for _ in range(1 + passes)
  ]
  # [passes, ways, clocks]
  totals = np.array(found).sum(1)
  ratios = totals[1:, 0] / totals[1:, 1]
  return {
    'job': ways.job,
    'plain': ways.plain,
    'other': ways.other,
    'steps': ways.steps,
    'seconds': [measuring.spread(totals[1:, way, 0].tolist()) for way in range(2)],
    'processor_seconds': [measuring.spread(totals[1:, way, 1].tolist()) for way in range(2)],
    'faster': measuring.spread(ratios[:, 0].tolist()),
    'less_processor_time': measuring.spread(ratios[:, 1].tolist()),
    'first_seconds': totals[0, :, 0].tolist(),
    'load': os.getloadavg()[0],
    **measuring.machine(),
  }
