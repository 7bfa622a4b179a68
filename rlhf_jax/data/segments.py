"""Comparisons of segments of behaviour on the LQR task, labelled by regret or by return."""

import dataclasses
import functools
import hashlib
from typing import Any

import jax
import numpy as np
from flax import struct

from rlhf_jax.common.errors import DataError
from rlhf_jax.common.types import Pairs, StepRatings
from rlhf_jax.data.lqr import LQR, LQRConfig
from rlhf_jax.feedback.labelling import bayes_accuracy, label

Array = Any


@struct.dataclass
class Segments:
  """Steps of control, where `Pairs` of texts have `Sequences`; their `[..., R]` is `[..., T]` here.

  Attributes:
    states: `[..., T, S]` float32, in which each action is chosen.
    actions: `[..., T, A]` float32.
    response_mask: `[..., T]` bool, True at real steps; objectives know it by this name.
  """

  states: Array
  actions: Array
  response_mask: Array

  @property
  def imitated(self) -> Array:
    """`[..., T]` bool, the steps that supervised objectives learn to take: all."""
    return self.response_mask


@dataclasses.dataclass(frozen=True)
class ControlFeedback:
  """Comparisons to learn from and held out, and what is known about them.

  Attributes:
    train: `[N, 2, T]` segments, the preferred one first.
    held_out: fresh draws of the same kind.
    task: the problem with its solution.
    bayes_accuracy: the best accuracy any judge can have on `held_out`; None if that is empty.
    source: its name, for messages.
    quarantined: records set aside; there are none.
  """

  train: Pairs
  held_out: Pairs
  task: LQR
  bayes_accuracy: float | None
  source: str = 'embedded:lqr'
  quarantined: int = 0

  def require(self, split: str, kind: str) -> Pairs:
    """`train` or `held_out` comparisons, whose segments are demonstrations and have rated steps.

    Raises DataError for another kind, and where there are none.
    """
    if kind not in ('comparisons', 'demonstrations', 'step_ratings'):
      raise DataError(
        f'{self.source}: it has comparisons, the segments they consist of, and rewards of their '
        f'steps, no {kind}. Choose an objective that learns from those, such as CPL, SFT or IQL.'
      )
    pairs: Pairs = getattr(self, split)
    if not len(pairs.preference):
      raise DataError(f'{self.source}: no {split} {kind}. Raise --config.data.held_out.')
    return pairs

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 over all arrays in order."""
    digest = hashlib.sha256()
    for pairs in (self.train, self.held_out):
      segments: Any = pairs.sequences
      for array in (segments.states, segments.actions, pairs.preference):
        digest.update(f'{array.shape}'.encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class SegmentColumns:
  """Rows of segments in memory, as `data.columns.Columns` holds rows of text."""

  rows: Pairs | Segments | StepRatings

  def __len__(self) -> int:
    return len(jax.tree.leaves(self.rows)[0])

  @property
  def extras(self) -> dict[str, Array]:
    """`[N, ...]` arrays beside the segments, by field of the batch."""
    return {'preference': self.rows.preference} if isinstance(self.rows, Pairs) else {}

  @property
  def statistics(self) -> dict[str, int]:
    """Counts for the record."""
    return {'rows': len(self)}

  def attach(self, **extras: Array) -> 'SegmentColumns':
    """The same rows with further fields of their batches."""
    return SegmentColumns(dataclasses.replace(self.rows, **extras))

  def take(self, rows: Any) -> Pairs | Segments | StepRatings:
    """`[B]` row numbers -> the batch with these rows."""
    return jax.tree.map(lambda x: x[rows], self.rows)


def columns_of(pairs: Pairs, kind: str, responses: str, count: int | None = None) -> SegmentColumns:
  """The first `count` pairs as comparisons, or their segments as demonstrations.

  Of demonstrations 'all' are both segments of each pair; otherwise the preferred ones.
  """
  pairs = jax.tree.map(lambda x: x[:count], pairs)
  if kind == 'comparisons':
    return SegmentColumns(pairs)
  segments: Any = pairs.sequences
  if responses == 'all':
    return SegmentColumns(jax.tree.map(lambda x: x.reshape((-1,) + x.shape[2:]), segments))
  return SegmentColumns(jax.tree.map(lambda x: x[:, 0], segments))


def make(config: LQRConfig, held_out: float) -> ControlFeedback:
  """Makes the comparisons; a function of the arguments alone.

  Args:
    config: how many, who acts in them, and how they are labelled.
    held_out: as in `DataConfig`; these are made on top of those to learn from, from random numbers
      of their own.
  """
  task = LQR(config)
  extra = int(held_out) if held_out >= 1 else round(held_out * config.pairs)
  train, _ = _compare(task, config, config.pairs, side=1)
  kept, probability = _compare(task, config, extra, side=2)
  return ControlFeedback(train, kept, task, bayes_accuracy(probability) if extra else None)


def roll_out(
  task: LQR, config: LQRConfig, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """Behaviour from random first states: states `[count, T, 2]`, actions `[count, T, 1]`."""
  spread = config.behaviour_spread * np.linalg.norm(task.gain)
  gains = config.behaviour_gain * task.gain + spread * rng.standard_normal((count, 2))
  state = rng.standard_normal((count, 2)) * np.sqrt(np.diag(task.initial))
  states, actions = [], []
  for noise in rng.standard_normal((config.horizon, count, 1)):
    action = (gains * state).sum(-1, keepdims=True) + config.behaviour_std * noise
    states.append(state)
    actions.append(action)
    state = task.step(state, action)
  return np.stack(states, 1), np.stack(actions, 1)


def _compare(task: LQR, config: LQRConfig, count: int, side: int) -> tuple[Pairs, np.ndarray]:
  """Comparisons, and the probability of each label."""
  behaviour, choices = (np.random.default_rng([config.seed, side, kind]) for kind in range(2))
  states, actions = (
    x.reshape(count, 2, *x.shape[1:]) for x in roll_out(task, config, 2 * count, behaviour)
  )
  compared = task.advantage if config.labels == 'regret' else task.reward
  scores = compared(states, actions).sum(-1)
  labels = label(scores, np.array([config.temperature]), flip_rate=0.0, rng=choices)
  rows, order = np.arange(count)[:, None], np.where(labels.first[:, None], [0, 1], [1, 0])
  segments: Any = Segments(
    states=states[rows, order].astype(np.float32),
    actions=actions[rows, order].astype(np.float32),
    response_mask=np.ones(states.shape[:-1], bool),
  )
  ones = np.ones(count, np.float32)
  return Pairs(sequences=segments, preference=ones, margin=0 * ones), labels.probability
