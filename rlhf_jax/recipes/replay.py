"""Makes a step of a run again, from the checkpoint before it, and says what went wrong in it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.common import determinism, processes
from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.common.types import Sequences
from rlhf_jax.data.segments import ControlFeedback
from rlhf_jax.evaluation.policy import decode_sequences
from rlhf_jax.feedback.dataset import Feedback
from rlhf_jax.recipes import Built, build
from rlhf_jax.runs import Run
from rlhf_jax.training import dumps
from rlhf_jax.training.checkpoints import Checkpoints
from rlhf_jax.training.examine import Examined, nonfinite_counts
from rlhf_jax.training.recipe import Prepared
from rlhf_jax.training.state import TrainState

_SEQUENCES = ('prompt', 'prompt_mask', 'response', 'response_mask')


class Ratios(NamedTuple):
  """How far the policy is from another: the largest |log-ratio| of a token, and its row."""

  largest: float
  row: int


class Replay(NamedTuple):
  """A step that was made again.

  Attributes:
    step: the iteration, from 1.
    checkpoint: the step of the checkpoint that it was made from; None: from the beginning.
    now: what its dump would be, made again.
    differing: names of arrays and metrics that are not those of the dump, bit for bit.
    close: whether they differ by rounding alone, as on another number of devices.
    parameters: how many numbers are not finite before the step, by name, of parameters,
    optimizer: of the optimizer's state, and
    carry: of what the recipe carries.
    largest: the largest magnitude of each role's parameters before the step.
    examined: the update that goes wrong.
    ratios: log-ratios of the policy before the step to others, by their name.
    texts: from the batch's row to its prompt and its responses.
    sampled: from the sample's row to the same; rewards are of these rows.
  """

  step: int
  checkpoint: int | None
  now: dumps.Dump
  differing: list[str]
  close: bool
  parameters: dict[str, int]
  optimizer: dict[str, int]
  carry: dict[str, int]
  largest: dict[str, float]
  examined: Examined
  ratios: dict[str, Ratios]
  texts: Callable[[int], list[str]]
  sampled: Callable[[int], list[str]]


def replay(run: Run, dump: dumps.Dump, feedback: Feedback | ControlFeedback) -> Replay:
  """Makes the step of a dump again; the run directory is not changed.

  Runs are the same bit for bit every time, so the state before the step need not have been saved:
  it is made from the last checkpoint before it, or from the beginning.

  Raises UserError where the run's parents are gone, or its mesh does not fit the devices.
  """
  config = run.config
  if config.deterministic:
    determinism.require()
  built = build(config, run.parents(), feedback)
  checkpoints = Checkpoints(run.folder / 'checkpoints', config.checkpoint)
  try:
    start = checkpoints.latest_before(dump.step)
    with jax.set_mesh(built.mesh):
      if start is None:
        state = built.recipe.init()
      else:
        state = checkpoints.restore(built.recipe.abstract, before=dump.step)[0]
        start = int(state.step)
      return _again(built, state, start, dump)
  finally:
    checkpoints.close()


def _again(built: Built, state: TrainState, start: int | None, dump: dumps.Dump) -> Replay:
  recipe = built.recipe
  for number in range(int(state.step), dump.step - 1):
    prepared = recipe.prepare(state, recipe.batch(number))
    state, _ = recipe.update(dataclasses.replace(state, carry=prepared.carry), prepared.batch)
  prepared = recipe.prepare(state, recipe.batch(dump.step - 1))
  before = dataclasses.replace(state, carry=prepared.carry)
  # The update uses its state up.
  _, metrics = recipe.update(jax.tree.map(jnp.copy, before), prepared.batch)
  values = metrics_lib.values({**prepared.metrics, **metrics})
  now = dumps.dump_of(dump.step, dumps.arrays_of(prepared), values)
  assert recipe.examine is not None
  decode = None if built.tokenizer is None else built.tokenizer.decode
  return Replay(
    step=dump.step,
    checkpoint=start,
    now=now,
    differing=_differing(now, dump, _same_bits),
    close=not _differing(now, dump, _close),
    parameters=nonfinite_counts(before.by_role),
    optimizer=nonfinite_counts(before.opt_state),
    carry=nonfinite_counts(state.carry),
    largest={role: _largest(tree) for role, tree in before.by_role.items()},
    examined=recipe.examine(before, prepared.batch),
    ratios=_ratios(recipe.logprobs, before, prepared),
    texts=_texts_of(now.batch, decode),
    sampled=_texts_of(now.samples, decode),
  )


def _differing(
  now: dumps.Dump, then: dumps.Dump, same: Callable[[np.ndarray, np.ndarray], bool]
) -> list[str]:
  """What of a step is not what it was."""
  found = []
  for part in ('batch', 'samples', 'rewards', 'values'):
    one, other = getattr(now, part), getattr(then, part)
    for name in sorted(one.keys() | other.keys()):
      both = name in one and name in other
      if not both or not same(np.asarray(one[name]), np.asarray(other[name])):
        found.append(f'{"metric" if part == "values" else part} {name}')
  return found


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
  if one.shape != other.shape or one.dtype != other.dtype:
    return False
  # Metrics are told by their names where they are not finite: a nan there has no bits.
  return one.tobytes() == other.tobytes() or bool(one.ndim == 0 and np.isnan([one, other]).all())


def _close(one: np.ndarray, other: np.ndarray) -> bool:
  if one.shape != other.shape or one.dtype != other.dtype:
    return False
  if one.ndim == 0 and not (np.isfinite(one) and np.isfinite(other)):
    return True  # what becomes of a nan in a sum or maximum depends on how devices share it
  return np.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=one.dtype.kind == 'f')


def _largest(tree: Any) -> float:
  leaves = [jnp.abs(leaf).max() for leaf in jax.tree.leaves(tree) if leaf.size]
  return max((float(leaf) for leaf in leaves), default=0.0)


def _ratios(
  logprobs: Callable[[Any, Any], Any] | None, state: TrainState, prepared: Prepared
) -> dict[str, Ratios]:
  """Of the policy before the step to those whose log-probs the batch holds."""
  batch = prepared.batch
  others = {
    'the policy that sampled': getattr(batch, 'old_logprobs', None),
    'the reference': getattr(batch, 'reference_logprobs', None),
  }
  others = {name: array for name, array in others.items() if array is not None}
  if logprobs is None or not others:
    return {}
  mask = np.asarray(processes.to_host(batch.sequences.response_mask))
  own = processes.to_host(logprobs(state.by_role, batch))
  found = {}
  for name, array in others.items():
    with np.errstate(invalid='ignore'):
      ratios = np.where(mask, np.abs(own - processes.to_host(array)), 0.0)
    by_row = ratios.reshape(len(ratios), -1).max(-1)  # nan wins
    row = int(np.argmax(by_row))
    found[name] = Ratios(float(by_row[row]), row)
  return found


def _texts_of(
  leaves: Mapping[str, np.ndarray], decode: Callable[[list[int]], str] | None
) -> Callable[[int], list[str]]:
  """From a row to its prompt and its responses; to nothing where there are no texts."""
  name = next((name for name in leaves if name.split('.')[-1] == 'prompt'), None)
  prefix = '' if name is None else name.removesuffix('prompt')
  fields = {field: leaves[prefix + field] for field in _SEQUENCES if prefix + field in leaves}
  if decode is None or len(fields) < len(_SEQUENCES):
    return lambda row: []

  def texts(row: int) -> list[str]:
    # One response, or several of one prompt.
    one = {field: array[row].reshape(-1, array.shape[-1]) for field, array in fields.items()}
    prompts, responses = decode_sequences(Sequences(**one), decode)
    return [prompts[0], *responses]

  return texts


def rows_of(array: np.ndarray) -> list[int]:
  """The rows of an array that hold a number that is not finite."""
  if array.dtype.kind != 'f' or array.ndim == 0:
    return []
  bad = ~np.isfinite(array.reshape(len(array), -1)).all(-1)
  return np.flatnonzero(bad).tolist()
