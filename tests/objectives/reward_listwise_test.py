"""Plackett-Luce against its definition, as a sequence of choices, in float64 NumPy."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives.reward_listwise import ListwiseRewardConfig, plackett_luce
from rlhf_jax.objectives.reward_model import bradley_terry
from tests.objectives import tabular
from tests.objectives.settings import assert_refused
from tests.objectives.tabular import assert_equals_slow_loss, make_batch, make_outputs


def slow_row(scores: np.ndarray, rank: np.ndarray, there: np.ndarray) -> float:
  """Each response that beats another is chosen from those that are not ranked above it."""
  loss, present = 0.0, np.flatnonzero(there)
  for i in present:
    if any(rank[j] > rank[i] for j in present):
      rivals = [np.exp(scores[j]) for j in present if rank[j] >= rank[i]]
      loss -= np.log(np.exp(scores[i]) / sum(rivals))
  return float(loss)


def test_the_loss_is_the_mean_over_rankings() -> None:
  """Whole rankings, ties at the top and at the bottom, and a place that is not there."""
  batch, outputs = make_batch('rankings'), make_outputs('rankings')

  def slow(x: dict[str, np.ndarray]) -> float:
    rows = zip(x['scores'], batch.rank, batch.mask, strict=True)
    return float(np.mean([slow_row(*row) for row in rows]))

  assert_equals_slow_loss(ListwiseRewardConfig(), batch, outputs, slow, 'scores')


def test_probabilities_of_all_rankings_add_up_to_one() -> None:
  """Without ties it is a distribution over permutations."""
  scores = jnp.array([0.3, -1.0, 0.8, 0.1])
  ranks = jnp.array(list(itertools.permutations(range(1, 5))))
  mask = jnp.ones(ranks.shape, bool)
  losses = plackett_luce(jnp.broadcast_to(scores, ranks.shape), ranks, mask)
  np.testing.assert_allclose(jnp.exp(-losses).sum(), 1.0, rtol=1e-5)


def test_of_two_it_is_bradley_terry() -> None:
  """A comparison is a ranking of two."""
  scores = jnp.array([[0.3, -1.0], [-2.0, 0.5]])
  ones = jnp.ones(2)
  expected = bradley_terry(scores, ones, ones, margin_coefficient=0.0)
  found = plackett_luce(scores, jnp.array([[1, 2], [1, 2]]), jnp.ones((2, 2), bool))
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_what_says_nothing_costs_nothing() -> None:
  """All equal, or a single response: loss 0 and no gradient."""
  batch, outputs = make_batch('rankings'), make_outputs('rankings')
  equal = batch.replace(rank=np.ones_like(batch.rank))
  alone = batch.replace(mask=np.arange(3) < np.ones((4, 1)))
  for silent in (equal, alone):
    loss, slopes = tabular.direct_loss(ListwiseRewardConfig(), outputs, silent)
    assert loss == 0.0
    np.testing.assert_array_equal(slopes['scores'], 0.0)


def test_metrics_count_pairs_and_best() -> None:
  """Pairs in the right order, predicted ties half; whether the highest score has rank 1."""
  batch, outputs = make_batch('rankings'), make_outputs('rankings')
  outputs['scores'] = np.array(
    [[2.0, 1.0, 0.0], [1.0, 0.0, 0.5], [0.0, 0.0, 9.0], [0.0, 3.0, -1.0]], np.float32
  )
  _, metrics, _ = tabular.evaluator(ListwiseRewardConfig(), tabular.DIRECT)(outputs, batch)
  # Ranks [2 1 3], [1 1 2], [1 2 (1)], [1 2 2]: 2 of 3, 1 of 2, a tie, 1 of 2.
  np.testing.assert_allclose(metrics['pair_accuracy'].value(), (2 + 1 + 0.5 + 1) / 8)
  # Of equal highest scores the first counts.
  np.testing.assert_allclose(metrics['best_accuracy'].value(), (0 + 1 + 1 + 0) / 4)


@pytest.mark.parametrize(
  ('settings', 'field'),
  [
    ({'normalization': 'whiten'}, 'normalization'),
    ({'normalization_samples': 1}, 'normalization_samples'),
  ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], field: str) -> None:
  """The error has the field's dotted name."""
  assert_refused(ListwiseRewardConfig, settings, field)
