"""Filtered and weighted behaviour cloning, worked in float64 NumPy."""

from typing import Any

import numpy as np
import pytest

from rlhf_jax.objectives.weighted_bc import WeightedBCConfig, curate
from tests.objectives.settings import assert_refused
from tests.objectives.tabular import assert_equals_slow_loss, make_batch, make_outputs

SCORES = np.array([0.5, 2.0, -1.0, 2.0, 1.0, 0.0, 2.0])


def none() -> np.ndarray:
  """Baselines that nobody asks for."""
  raise AssertionError('no baselines are needed')


def test_the_loss_weighs_every_token_by_its_response() -> None:
  """-sum of w log pi over the number of tokens, not over their weights."""
  batch, outputs = make_batch('ratings'), make_outputs('ratings')

  def slow(x: dict[str, np.ndarray]) -> float:
    mask = batch.sequences.response_mask
    terms = [-batch.score[b] * x['logprobs'][b, t] for b, t in np.argwhere(mask)]
    return float(np.mean(terms))

  assert_equals_slow_loss(WeightedBCConfig(), batch, outputs, slow, 'logprobs')


@pytest.mark.parametrize(
  ('keep', 'rows'),
  [(0.01, [1]), (2 / 7, [1, 3]), (4 / 7, [1, 3, 4, 6]), (1.0, list(range(7)))],
)
def test_the_best_are_kept_alike(keep: float, rows: list[int]) -> None:
  """That fraction, at least one, of equal scores those listed first; all with weight 1."""
  curated = curate(WeightedBCConfig(keep=keep), SCORES, none)
  np.testing.assert_array_equal(np.flatnonzero(curated.keep), rows)
  np.testing.assert_array_equal(curated.scores, 1.0)
  assert curated.weights is None


def test_of_many_equals_the_first_are_kept() -> None:
  """Also where sorting would not keep their order by itself."""
  scores = np.tile([1.0, 2.0], 50)
  kept = np.flatnonzero(curate(WeightedBCConfig(keep=0.2), scores, none).keep)
  np.testing.assert_array_equal(kept, np.arange(1, 41, 2))


def test_weights_are_exponential_with_mean_one() -> None:
  """exp(score / temperature) over its mean, whatever the scores' zero; every row stays."""
  config = WeightedBCConfig(variant='weighted', temperature=0.5)
  raw = np.exp(SCORES / 0.5)
  curated = curate(config, SCORES, none)
  np.testing.assert_allclose(curated.scores, raw / raw.mean())
  assert curated.keep.all() and curated.weights is None
  np.testing.assert_allclose(curate(config, SCORES + 1e4, none).scores, curated.scores)


def test_large_weights_are_cut() -> None:
  """At `max_weight` times the mean before the cut; far scores neither overflow nor vanish all."""
  config = WeightedBCConfig(variant='weighted', temperature=1e-3, max_weight=2.0)
  weights = curate(config, np.array([0.0, 10.0, 5.0]), none).scores
  np.testing.assert_array_equal(weights, [0.0, 2.0, 0.0])


@pytest.mark.parametrize(
  ('settings', 'field'),
  [
    ({'variant': 'best'}, 'variant'),
    ({'keep': 0.0}, 'keep'),
    ({'keep': 1.1}, 'keep'),
    ({'temperature': 0.0}, 'temperature'),
    ({'max_weight': 0.5}, 'max_weight'),
  ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], field: str) -> None:
  """The error has the field's dotted name."""
  assert_refused(WeightedBCConfig, settings, field)
