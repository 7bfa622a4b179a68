"""Segments of behaviour on the LQR task, compared, scored and ranked by regret or by return."""

import dataclasses
import functools
import hashlib
import math
from typing import Any

import jax
import numpy as np
from flax import struct

from rlhf_jax.common.errors import DataError
from rlhf_jax.common.types import Pairs, Rankings, Ratings, StepRatings
from rlhf_jax.data.lqr import LQR, LQRConfig
from rlhf_jax.feedback.labelling import bayes_accuracy, label, rank

Array = Any
Judged = Pairs | Ratings | Rankings


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

  @property
  def shares_prompts(self) -> bool:
    """There are no prompts."""
    return False


@struct.dataclass
class ControlSplit:
  """What is learnt from, or what is held out.

  Attributes:
    comparisons: `[N, 2, T]` segments, the preferred one first.
    ratings: `[N, T]` segments with scores.
    rankings: `[N, K, T]` segments with ranks.
  """

  comparisons: Pairs
  ratings: Ratings
  rankings: Rankings


@dataclasses.dataclass(frozen=True)
class ControlFeedback:
  """Judged segments to learn from and held out, and what is known about them.

  Attributes:
    train: what is learnt from.
    held_out: fresh draws of the same kinds.
    task: the problem with its solution.
    bayes_accuracy: the best accuracy any judge can have on held-out comparisons; None without any.
    source: its name, for messages.
    quarantined: records set aside; there are none.
    damage: of files; there are none.
  """

  train: ControlSplit
  held_out: ControlSplit
  task: LQR
  bayes_accuracy: float | None
  source: str = 'embedded:lqr'
  quarantined: int = 0
  damage: tuple[str, ...] = ()

  def require(self, split: str, kind: str, instead: str = '') -> Judged:
    """What a split has of a kind; demonstrations and step ratings are the comparisons' segments.

    Raises DataError for another kind, and where there are none.
    """
    del instead  # no objective of control has records that come second
    field = {'demonstrations': 'comparisons', 'step_ratings': 'comparisons'}.get(kind, kind)
    if field not in ('comparisons', 'ratings', 'rankings'):
      raise DataError(
        f'{self.source}: it has comparisons, ratings and rankings of segments, the segments, and '
        f'rewards of their steps, no {kind}. Choose an objective that learns from those, such as '
        'CPL, SFT or IQL.'
      )
    rows: Judged = getattr(getattr(self, split), field)
    if not len(jax.tree.leaves(rows)[0]):
      raise DataError(f'{self.source}: no {split} {kind}. Raise --config.data.held_out.')
    return rows

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 over all arrays in order."""
    digest = hashlib.sha256()
    for array in jax.tree.leaves((self.train, self.held_out)):
      digest.update(f'{array.shape}'.encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class SegmentColumns:
  """Rows of segments in memory, as `data.columns.Columns` holds rows of text."""

  rows: Judged | Segments | StepRatings

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

  def take(self, rows: Any, places: Any = None) -> Judged | Segments | StepRatings:
    """`[B]` row numbers -> the batch with these rows, or with those at `places` of it."""
    here = rows if places is None else rows[places]
    return jax.tree.map(lambda x: x[here], self.rows)


def columns_of(rows: Judged, kind: str, responses: str, count: int | None = None) -> SegmentColumns:
  """The first `count` rows as they are judged, or comparisons' segments as demonstrations.

  Of demonstrations 'all' are both segments of each pair; otherwise the preferred ones.
  """
  rows = jax.tree.map(lambda x: x[:count], rows)
  if kind != 'demonstrations':
    return SegmentColumns(rows)
  segments: Any = rows.sequences
  if responses == 'all':
    return SegmentColumns(jax.tree.map(lambda x: x.reshape((-1,) + x.shape[2:]), segments))
  return SegmentColumns(jax.tree.map(lambda x: x[:, 0], segments))


def make(config: LQRConfig, held_out: float) -> ControlFeedback:
  """Makes all that is judged; a function of the arguments alone.

  Args:
    config: how much, who acts in it, and how it is labelled.
    held_out: as in `DataConfig`; these are made on top of those to learn from. Every kind and side
      has random numbers of its own.
  """
  task = LQR(config)

  def split(side: int) -> tuple[ControlSplit, np.ndarray]:
    sizes = [config.pairs, config.ratings, config.rankings]
    if side == 2:
      sizes = [int(held_out) if held_out >= 1 else round(held_out * size) for size in sizes]
    comparisons, probability = _compare(task, config, sizes[0], side)
    ratings, rankings = _rate(task, config, sizes[1], side), _rank(task, config, sizes[2], side)
    return ControlSplit(comparisons, ratings, rankings), probability

  train, _ = split(1)
  kept, probability = split(2)
  accuracy = bayes_accuracy(probability) if probability.size else None
  return ControlFeedback(train, kept, task, accuracy)


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


def _behave(
  task: LQR, config: LQRConfig, shape: tuple[int, ...], rng: np.random.Generator
) -> tuple[Segments, np.ndarray]:
  """Segments `[*shape, T]`, and what is compared of each, `shape` float64."""
  states, actions = (
    x.reshape(*shape, *x.shape[1:]) for x in roll_out(task, config, math.prod(shape), rng)
  )
  compared = task.advantage if config.labels == 'regret' else task.reward
  mask = np.ones(states.shape[:-1], bool)
  segments = Segments(states.astype(np.float32), actions.astype(np.float32), mask)
  return segments, compared(states, actions).sum(-1)


def _compare(task: LQR, config: LQRConfig, count: int, side: int) -> tuple[Pairs, np.ndarray]:
  """Comparisons, and the probability of each label."""
  behaviour, choices = (np.random.default_rng([config.seed, side, kind]) for kind in range(2))
  segments: Any
  segments, scores = _behave(task, config, (count, 2), behaviour)
  labels = label(scores, np.array([config.temperature]), flip_rate=0.0, rng=choices)
  rows, order = np.arange(count)[:, None], np.where(labels.first[:, None], [0, 1], [1, 0])
  segments = jax.tree.map(lambda x: x[rows, order], segments)
  ones = np.ones(count, np.float32)
  return Pairs(sequences=segments, preference=ones, margin=0 * ones), labels.probability


def _rate(task: LQR, config: LQRConfig, count: int, side: int) -> Ratings:
  """Scored segments.

  With the noise of a standard Gumbel variable times the temperature on each, any two are ordered as
  `label` would (Yellott 1977).
  """
  rng = np.random.default_rng([config.seed, side, 2])
  segments: Any
  segments, scores = _behave(task, config, (count,), rng)
  noisy = scores + config.temperature * rng.gumbel(size=count)
  return Ratings(sequences=segments, score=noisy.astype(np.float32))


def _rank(task: LQR, config: LQRConfig, count: int, side: int) -> Rankings:
  """Ranked segments, each with a first state of its own."""
  rng = np.random.default_rng([config.seed, side, 3])
  segments: Any
  segments, scores = _behave(task, config, (count, config.ranking_size), rng)
  orders = rank(scores, np.array([config.temperature]), flip_rate=0.0, rng=rng)
  return Rankings(segments, orders.rank.astype(np.int32), np.ones(scores.shape, bool))
