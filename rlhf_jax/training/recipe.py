"""A recipe: everything the loop needs to know of a stage."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.common.metrics import Metrics
from rlhf_jax.training.examine import Examined
from rlhf_jax.training.state import TrainState


class Evaluation(NamedTuple):
  """Answers about a model: numbers for logs and plots, and the samples behind them.

  Attributes:
    scalars: by name.
    arrays: by name, one entry a prompt or an example; what intervals are computed from.
  """

  scalars: dict[str, float]
  arrays: dict[str, np.ndarray]


class Prepared(NamedTuple):
  """What comes before an update.

  Attributes:
    batch: what the update trains on.
    carry: the recipe's for the next step.
    metrics: what is worth watching.
    samples: the `Sequences` that the batch was made from, and
    rewards: `[N, K]`, what each of them was paid; both are kept with a step that goes wrong.
    reward_names: of the K rewards.
  """

  batch: Any
  carry: Any
  metrics: Metrics
  samples: Any = None
  rewards: Any = None
  reward_names: tuple[str, ...] = ()


class Recipe(NamedTuple):
  """A stage as the loop sees it.

  Attributes:
    abstract: the state's shapes, dtypes and shardings.
    init: makes the initial state, in place on the mesh.
    batch: the host batch of a step; a function of the step alone.
    prepare: from `(state, host batch)` to what the update trains on: the identity for supervised
      objectives, scoring with the frozen reference for DPO, a whole rollout for PPO. Frozen trees
      are arguments of its jitted parts, never constants.
    update: jitted `(state, batch) -> (state, metrics)`; the state is donated.
    evaluate: from `(params and targets by role, step)` to answers.
    finish: the last touch to the state after the last step, e.g. a reward model's normalisation.
    shown: metrics of the progress line.
    rows: counts of the training rows for the record: how many there are, how many were cut.
    headline: numbers of the last evaluation that result.json states at its top.
    examine: from `(state, batch)` to the first of the step's updates that goes wrong.
    logprobs: from `(params and targets by role, batch)` to log-probs of the batch's responses,
      `[..., R]` float32; None where there are none.
    close: lets go of what it holds beside arrays, such as a connection; the loop calls it at the
      end, also after an error.
  """

  abstract: TrainState
  init: Callable[[], TrainState]
  batch: Callable[[int], Any]
  prepare: Callable[[TrainState, Any], Prepared]
  update: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
  evaluate: Callable[[Any, int], Evaluation]
  finish: Callable[[TrainState], TrainState]
  shown: tuple[str, ...]
  rows: dict[str, int]
  headline: tuple[str, ...] = ()
  examine: Callable[[TrainState, Any], Examined] | None = None
  logprobs: Callable[[Any, Any], Any] | None = None
  close: Callable[[], None] = lambda: None
