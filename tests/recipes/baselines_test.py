"""Baselines of A-LoL: predictions from all other rows, and what is kept of a dataset."""

import pathlib

import jax
import numpy as np
import pytest

from rlhf_jax.common.errors import DataError
from rlhf_jax.common.types import Ratings
from rlhf_jax.models import roles
from rlhf_jax.objectives.alol import ALoLConfig
from rlhf_jax.recipes import baselines
from rlhf_jax.recipes.baselines import leave_one_out_ridge, reference_baselines
from rlhf_jax.recipes.offline import curated, encode
from rlhf_jax.recipes.parts import Parts, load_parts
from rlhf_jax.runs import Run
from tests import tiny

RNG = np.random.default_rng(0)


def refitted(features: np.ndarray, goals: np.ndarray, penalty: float) -> np.ndarray:
  """Each row predicted by a ridge regression, with a free mean, on all others; solved anew."""
  found = []
  for row in range(len(goals)):
    others = np.arange(len(goals)) != row
    design = np.column_stack([np.ones(len(goals)), features])
    weights = np.diag([0.0] + [penalty] * features.shape[1])
    normal = design[others].T @ design[others] + weights
    found.append(design[row] @ np.linalg.solve(normal, design[others].T @ goals[others]))
  return np.array(found)


def slow_baselines(features: np.ndarray, goals: np.ndarray) -> np.ndarray:
  """Refits for every penalty of the grid; those of the least squared error."""
  centred = features - features.mean(0)
  unit = np.square(centred).sum() / min(features.shape)
  tried = [refitted(features, goals, unit * 10.0**power) for power in range(-6, 3)]
  return min(tried, key=lambda found: float(np.square(goals - found).sum()))


@pytest.mark.parametrize(('rows', 'width', 'noise'), [(30, 4, 0.1), (12, 20, 1.0), (40, 3, 50.0)])
def test_predictions_equal_refits_without_the_row(rows: int, width: int, noise: float) -> None:
  """By brute force, with few and with more features than rows, and with nothing to find."""
  features = RNG.normal(size=(rows, width)) + 5.0
  goals = features @ RNG.normal(size=width) + noise * RNG.normal(size=rows)
  np.testing.assert_allclose(
    leave_one_out_ridge(features, goals), slow_baselines(features, goals), rtol=1e-5, atol=1e-6
  )


def test_a_rows_own_score_does_not_move_its_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
  """At a given penalty: an advantage must not be explained by the score it is measured from."""
  monkeypatch.setattr(baselines, '_PENALTIES', (1e-2,))
  features, goals = RNG.normal(size=(20, 5)), RNG.normal(size=20)
  other = goals.copy()
  other[7] += 100.0
  before, after = leave_one_out_ridge(features, goals), leave_one_out_ridge(features, other)
  assert after[7] == pytest.approx(before[7], rel=1e-6)
  assert np.abs(np.delete(after - before, 7)).max() > 0.1


def test_features_that_say_nothing_give_the_mean_of_the_others() -> None:
  goals = RNG.normal(size=10)
  found = leave_one_out_ridge(np.ones((10, 3)), goals)
  np.testing.assert_allclose(found, [np.delete(goals, row).mean() for row in range(10)], rtol=1e-8)


@pytest.fixture(scope='module')
def parts(parents: pathlib.Path) -> Parts:
  config = tiny.make_config('alol', parents)
  runs = {role: Run(init) for role, (init, _) in config.inits().items()}
  with tiny.devices(1):
    return load_parts(config, runs, tiny.feedback_of(config.data.response_length))


@pytest.mark.slow
def test_the_reference_sees_the_prompt_alone(parts: Parts) -> None:
  """Features are its states at the end of each prompt, the rows in the order of the dataset."""
  columns = encode(parts, 'train')
  with jax.set_mesh(parts.mesh):
    found = reference_baselines(parts, columns)
    rows = columns.take(np.arange(len(columns)))
    assert isinstance(rows, Ratings) and parts.reference is not None
    states = roles.prompt_states(parts.model, parts.reference, rows.sequences)
  expected = slow_baselines(np.asarray(states, np.float64), np.asarray(rows.score, np.float64))
  assert found.shape == (len(columns),)
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('sampling', ['advantage', 'uniform'])
def test_rows_without_advantage_are_dropped(parts: Parts, sampling: str) -> None:
  """The others carry their advantage for a score, and are drawn in proportion to it."""
  parts.config.objective = ALoLConfig(sampling=sampling)
  columns = encode(parts, 'train')
  scores = np.asarray(columns.extras['score'], np.float64)
  with jax.set_mesh(parts.mesh):
    advantages = scores - reference_baselines(parts, columns)
    dataset = curated(parts, columns)
  kept = advantages > 0
  assert 0 < kept.sum() < len(kept) == len(columns)
  np.testing.assert_allclose(dataset.columns.extras['score'], advantages[kept], rtol=1e-5)
  assert dataset.columns.statistics['rows_left_out'] == (~kept).sum()
  whole, rest = (x.take(np.arange(len(x))) for x in (columns, dataset.columns))
  assert isinstance(whole, Ratings) and isinstance(rest, Ratings)
  np.testing.assert_array_equal(rest.sequences.response, whole.sequences.response[kept])
  if sampling == 'uniform':
    assert dataset.weights is None
  else:
    assert dataset.weights is not None
    weights = dataset.weights / dataset.weights.sum()
    np.testing.assert_allclose(weights, advantages[kept] / advantages[kept].sum(), rtol=1e-6)


def test_scores_that_are_all_alike_teach_nothing(parts: Parts) -> None:
  parts.config.objective = ALoLConfig()
  columns = encode(parts, 'train')
  columns = columns.attach(score=np.full(len(columns), 0.5, np.float32))
  with jax.set_mesh(parts.mesh), pytest.raises(DataError, match='no response has a positive'):
    curated(parts, columns)
