"""Samples and scores, for what objectives make of them."""

import dataclasses
from typing import Any

import numpy as np

from rlhf_jax.common.types import Experience
from rlhf_jax.objectives import ObjectiveConfig, objective_of
from rlhf_jax.objectives.base import Collected
from tests import quick
from tests.objectives import batches

SCORES = np.array([1.0, -0.5, 0.25, 2.0], np.float32)


def make_experience(bad: float = 0.0, **changes: Any) -> Any:
  """Four ragged samples; log-probs and tokens behind their ends are `bad`."""
  batch = batches.garbage(batches.make_batch('valued_rollouts'), bad, 0)
  experience = Experience(
    sequences=batch.sequences,
    old_logprobs=batch.old_logprobs,
    reference_logprobs=batch.reference_logprobs,
    scores=SCORES,
    values=batch.old_values,
  )
  return dataclasses.replace(experience, **changes)


def at_the_reference(experience: Experience) -> Experience:
  """The same samples of a policy that has not left the reference."""
  return dataclasses.replace(experience, reference_logprobs=experience.old_logprobs)


def collect(
  config: ObjectiveConfig, experience: Experience, **carry: float
) -> tuple[Any, dict[str, float], dict[str, float]]:
  """(batch, what is carried on, metrics as numbers); `carry` is the initial one unless given."""
  objective = objective_of(config)
  assert objective.collect is not None
  function = objective.collect
  first = {**objective.carry(config), **carry}
  found: Collected = quick.jit(lambda x, carry: function(config, x, carry))(
    experience, {name: np.float32(value) for name, value in first.items()}
  )
  numbers = {name: float(metric.value()) for name, metric in found.metrics.items()}
  return found.batch, {name: float(value) for name, value in found.carry.items()}, numbers


def token_kls(experience: Experience) -> np.ndarray:
  """log pi - log pi_ref of each token in float64, 0 behind the end, one at a time."""
  mask = experience.sequences.response_mask
  kls = np.zeros(mask.shape)
  for index in zip(*np.nonzero(mask), strict=True):
    kls[index] = float(experience.old_logprobs[index]) - experience.reference_logprobs[index]
  return kls


def whitened(values: np.ndarray) -> np.ndarray:
  """Mean 0 and biased variance 1, as in the released code of Huang et al. 2024."""
  return (values - values.mean()) / np.sqrt(values.var() + 1e-8)
