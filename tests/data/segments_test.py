"""Comparisons of LQR segments: dynamics, behaviour, labels, and what they are a function of."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax.data.lqr import LQR, LQRConfig
from rlhf_jax.data.segments import ControlSplit, make, roll_out

SMALL = LQRConfig(pairs=50, ratings=30, rankings=20, ranking_size=3, horizon=5)


def scores(task: LQR, pairs: Any, kind: str) -> np.ndarray:
  """`[N, K]` float64: sums of advantages or of rewards, step by step."""
  function = {'regret': task.advantage, 'return': task.reward}[kind]
  segments: Any = pairs.sequences
  totals = np.zeros(segments.states.shape[:2])
  for t in range(segments.states.shape[2]):
    state, action = (x[:, :, t].astype(np.float64) for x in (segments.states, segments.actions))
    totals += function(state, action)
  return totals


def test_segments_obey_the_dynamics() -> None:
  """Each state follows from the one before; every step is real; the shapes are those promised."""
  feedback = make(SMALL, held_out=7)
  for side, count in ((feedback.train, 50), (feedback.held_out, 7)):
    pairs = side.comparisons
    segments: Any = pairs.sequences
    assert segments.states.shape == (count, 2, 5, 2) and segments.states.dtype == np.float32
    assert segments.actions.shape == (count, 2, 5, 1) and segments.actions.dtype == np.float32
    assert segments.response_mask.shape == (count, 2, 5) and segments.response_mask.all()
    assert pairs.preference.shape == (count,) and (pairs.preference == 1).all()
    assert pairs.margin.shape == (count,) and not pairs.margin.any()
    after = feedback.task.step(segments.states[:, :, :-1], segments.actions[:, :, :-1])
    np.testing.assert_allclose(segments.states[:, :, 1:], after, rtol=1e-5, atol=1e-6)


def test_behaviour_is_what_the_config_says() -> None:
  """First states, the gains' mean and spread, and the noise, from 20,000 segments."""
  config = LQRConfig(
    behaviour_gain=0.5, behaviour_spread=0.2, behaviour_std=0.3, position_std=2.0, horizon=8
  )
  task = LQR(config)
  states, actions = roll_out(task, config, 20_000, np.random.default_rng(0))
  first = states[:, 0]
  np.testing.assert_allclose(np.cov(first.T), np.diag([4.0, 1.0]), atol=0.1)
  # The first step: given the state, the action has mean 0.5 K s and these two kinds of noise.
  rest = (actions[:, 0] - 0.5 * first @ task.gain.T)[:, 0]
  spread = 0.2 * np.linalg.norm(task.gain)
  expected = 0.3**2 + spread**2 * np.square(first).sum(1)
  standard = rest / np.sqrt(expected)
  assert abs(standard.mean()) < 4 / math.sqrt(20_000)
  assert standard.std() == pytest.approx(1, abs=4 / math.sqrt(40_000))
  # A segment keeps its gain: what two of its actions have in common is the gain's deviation.
  later = (actions[:, 7] - 0.5 * states[:, 7] @ task.gain.T)[:, 0]
  overlap = (first * states[:, 7]).sum(1)
  shared = (rest * later).sum() / overlap.sum()
  assert shared == pytest.approx(spread**2, rel=0.2)


@pytest.mark.parametrize('labels', ['regret', 'return'])
def test_without_noise_the_better_segment_is_first(labels: str) -> None:
  """Temperature 0: the larger sum, of what the config names, is always preferred."""
  feedback = make(dataclasses.replace(SMALL, labels=labels, temperature=0.0), held_out=0.5)
  assert feedback.bayes_accuracy == 1
  for side in (feedback.train, feedback.held_out):
    better, worse = scores(feedback.task, side.comparisons, labels).T
    assert (better > worse).all()


@pytest.mark.parametrize(
  ('labels', 'temperature'), [('regret', 1.0), ('regret', 20.0), ('return', 5.0)]
)
def test_labels_have_bradley_terry_frequencies(labels: str, temperature: float) -> None:
  """In bins of the predicted probability, the better segment wins as often as it should."""
  config = LQRConfig(labels=labels, temperature=temperature, behaviour_gain=0.7)
  feedback = make(config, held_out=1000)
  first, second = scores(feedback.task, feedback.train.comparisons, labels).T
  chance = 1 / (1 + np.exp(-np.abs(first - second) / temperature))
  won = first > second
  for low, high in ((0.5, 0.7), (0.7, 0.9), (0.9, 1.0)):
    within = (low <= chance) & (chance < high)
    error = math.sqrt((chance * (1 - chance))[within].sum())
    assert within.sum() > 200
    assert abs((won[within] - chance[within]).sum()) < 4 * error
  first, second = scores(feedback.task, feedback.held_out.comparisons, labels).T
  expected = (1 / (1 + np.exp(-np.abs(first - second) / temperature))).mean()
  assert feedback.bayes_accuracy == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize('labels', ['regret', 'return'])
def test_scores_and_ranks_without_noise(labels: str) -> None:
  """Temperature 0: sums of what the config names, step by step, and their order."""
  config = dataclasses.replace(SMALL, labels=labels, temperature=0.0)
  feedback = make(config, held_out=7)
  for side, rated, ranked in ((feedback.train, 30, 20), (feedback.held_out, 7, 7)):
    segments: Any = side.ratings.sequences
    assert segments.states.shape == (rated, 5, 2) and segments.response_mask.all()
    paired = jax.tree.map(lambda x: x[:, None], side.ratings)
    np.testing.assert_allclose(
      side.ratings.score, scores(feedback.task, paired, labels)[:, 0], rtol=1e-5
    )
    assert side.rankings.rank.shape == (ranked, 3) and side.rankings.mask.all()
    totals = scores(feedback.task, side.rankings, labels)
    best_first = np.take_along_axis(totals, np.argsort(side.rankings.rank, axis=1), axis=1)
    assert (np.diff(best_first) < 0).all()


def test_scores_and_ranks_have_the_noise_of_comparisons() -> None:
  """Two scored segments, and two of a ranking, are ordered by the odds of a comparison."""
  feedback = make(LQRConfig(temperature=20.0, pairs=1, horizon=8), held_out=0)
  ratings = jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), feedback.train.ratings)
  rankings = jax.tree.map(lambda x: x[:, :2], feedback.train.rankings)
  for rows, better in ((ratings, ratings.score), (rankings, -rankings.rank)):
    first, second = scores(feedback.task, rows, 'regret').T
    chance = 1 / (1 + np.exp(-(first - second) / 20.0))
    won = better[:, 0] > better[:, 1]
    for sure in (chance > 0.5, chance < 0.5):
      error = math.sqrt((chance * (1 - chance))[sure].sum())
      assert abs((won[sure] - chance[sure]).sum()) < 4 * error


def test_regret_and_return_disagree_about_the_same_segments() -> None:
  """The segments do not depend on what is compared; the preferences often do."""
  regret: Any
  reward: Any
  regret, reward = (
    make(
      dataclasses.replace(SMALL, pairs=500, labels=labels, temperature=0.0), 0
    ).train.comparisons.sequences
    for labels in ('regret', 'return')
  )
  same = (regret.states == reward.states).all((1, 2, 3))
  swapped = (regret.states == reward.states[:, ::-1]).all((1, 2, 3))
  assert (same ^ swapped).all()
  assert 0.1 < swapped.mean() < 0.6


def test_feedback_is_a_function_of_the_config() -> None:
  """Equal configs, equal arrays; another seed, others; the sides share nothing."""
  one, again = make(SMALL, 50), make(SMALL, 50)
  for a, b in zip(
    jax.tree.leaves((one.train, one.held_out)),
    jax.tree.leaves((again.train, again.held_out)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  assert one.bayes_accuracy == again.bayes_accuracy

  def first_states(side: ControlSplit) -> set[float]:
    kinds: Any = (side.comparisons, side.ratings, side.rankings)
    found = [rows.sequences.states[..., 0, 0].ravel() for rows in kinds]
    return set(np.concatenate(found).tolist())

  assert len(first_states(one.train)) == 2 * SMALL.pairs + SMALL.ratings + 3 * SMALL.rankings

  other = make(dataclasses.replace(SMALL, seed=1), 0)
  assert not first_states(one.train) & first_states(one.held_out)
  assert not first_states(one.train) & first_states(other.train)
  fewer = make(SMALL, 0)
  assert fewer.bayes_accuracy is None and not fewer.held_out.comparisons.preference.size
  for a, b in zip(jax.tree.leaves(fewer.train), jax.tree.leaves(one.train), strict=True):
    np.testing.assert_array_equal(a, b)
