"""Our losses on the inputs of the golden fixtures, and what may differ from the references."""

from typing import Any

import numpy as np

from rlhf_jax.common.types import Experience, Pairs, Ratings, Sequences
from rlhf_jax.objectives import ObjectiveConfig, objective_of
from tests import quick
from tests.objectives import tabular

# Our arithmetic is float32, the references' float64.
RTOL, ATOL = 1e-5, 1e-6


def sequences(mask: np.ndarray) -> Sequences:
  """Responses of given masks `[..., R]`; nobody reads their tokens, which are all 0."""
  prompt = np.ones((*mask.shape[:-1], 1), bool)
  return Sequences(prompt.astype(np.int32), prompt, np.zeros(mask.shape, np.int32), mask)


def pairs(inputs: dict[str, np.ndarray], preference: Any = 1.0) -> Pairs:
  """Comparisons of a fixture; the first is preferred unless it says otherwise."""
  rows = len(inputs['mask'])
  return Pairs(
    sequences=sequences(inputs['mask']),
    preference=np.broadcast_to(np.float32(preference), (rows,)),
    margin=np.zeros(rows, np.float32),
    reference_logprobs=inputs.get('ref_logprobs'),
  )


def ratings(inputs: dict[str, np.ndarray], score: np.ndarray) -> Ratings:
  """Scored responses of a fixture."""
  return Ratings(sequences(inputs['mask']), score.astype(np.float32), inputs.get('ref_logprobs'))


def experience(inputs: dict[str, np.ndarray], scores: Any = None) -> Any:
  """Samples of a fixture, with its scores unless others are given."""
  mask = inputs['mask']
  return Experience(
    sequences=sequences(mask),
    old_logprobs=np.where(mask, inputs['old_logprobs'], 0.0).astype(np.float32),
    reference_logprobs=np.where(mask, inputs['ref_logprobs'], 0.0).astype(np.float32),
    scores=inputs['scores'] if scores is None else np.float32(scores),
    values=inputs.get('old_values'),
  )


def collected(config: ObjectiveConfig, samples: Experience) -> Any:
  """What the objective makes of samples in its first iteration."""
  objective = objective_of(config)
  assert objective.collect is not None
  collect = objective.collect
  carry = {name: np.float32(value) for name, value in objective.carry(config).items()}
  return quick.jit(lambda samples, carry: collect(config, samples, carry))(samples, carry).batch


def assert_close(ours: Any, theirs: Any, name: str = '') -> None:
  """Equal to 1e-5."""
  np.testing.assert_allclose(ours, theirs, rtol=RTOL, atol=ATOL, err_msg=name)


def assert_loss(
  config: ObjectiveConfig,
  batch: Any,
  inputs: dict[str, np.ndarray],
  case: dict[str, Any],
  **names: str,
) -> None:
  """Our mean loss and its gradients are a case's.

  Args:
    config: the named options that reproduce the reference.
    batch: what the loss eats.
    inputs: of the fixture.
    case: of the fixture.
    **names: our outputs, by the names of the inputs that are given for them.
  """
  outputs = {ours: inputs[theirs] for ours, theirs in names.items()}
  loss, slopes = tabular.direct_loss(config, outputs, tabular.prepared(config, batch))
  assert_close(loss, case['outputs']['loss'], 'loss')
  for ours, theirs in names.items():
    assert_close(slopes[ours], case['gradients'][theirs], ours)
