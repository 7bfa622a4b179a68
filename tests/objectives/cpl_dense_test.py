"""Dense CPL: all ordered pairs of a ranking, worked in float64 NumPy."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.types import Pairs, Rankings
from rlhf_jax.objectives.cpl import CPLConfig
from rlhf_jax.objectives.cpl_dense import DenseCPLConfig, dense_cpl
from tests.numerical import log_sigmoid
from tests.objectives import tabular
from tests.objectives.settings import assert_refused
from tests.objectives.tabular import assert_equals_slow_loss, make_batch, make_outputs

CONFIGS = {
  'default': DenseCPLConfig(),
  'kl, discounted': DenseCPLConfig(use_reference=True, gamma=0.9, alpha=0.3, lam=0.75),
  'imitating': DenseCPLConfig(bc_coefficient=0.4),
}


def slow(config: DenseCPLConfig, batch: Any, logprobs: np.ndarray) -> float:
  """Pair by pair: the mean over all, each with its ranking's imitation term."""
  losses = []
  for b, (rank, there) in enumerate(zip(batch.rank, batch.mask, strict=True)):
    segments = np.flatnonzero(there)
    scores, nll = {}, []
    for k in segments:
      tokens = np.flatnonzero(batch.sequences.response_mask[b, k])
      terms = logprobs[b, k].copy()
      nll.append(-terms[tokens].mean())
      if config.use_reference:
        terms -= batch.reference_logprobs[b, k]
      scores[k] = config.alpha * sum(config.gamma**t * terms[t] for t in tokens)
    for i, j in itertools.permutations(segments, 2):
      if rank[i] < rank[j]:
        loss = -log_sigmoid(scores[i] - config.lam * scores[j])
        losses.append(loss + config.bc_coefficient * np.mean(nll))
  return float(np.mean(losses))


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_the_loss_is_the_mean_over_ordered_pairs(config: DenseCPLConfig) -> None:
  """Ties and places that are not there make no pairs; values and gradients."""
  batch, outputs = make_batch('rankings'), make_outputs('rankings')
  assert_equals_slow_loss(
    config, batch, outputs, lambda x: slow(config, batch, x['logprobs']), 'logprobs'
  )
  mean, _, _ = tabular.evaluator(config, tabular.DIRECT)(outputs, batch)
  assert mean.weight == 3 + 2 + 1 + 2


def test_rankings_of_two_are_comparisons() -> None:
  """The same as CPL's, with the better one first or last."""
  pairs, outputs = make_batch('comparisons'), make_outputs('comparisons')
  labels = np.array([1.0, 0.0, 1.0, 0.0], np.float32)
  pairs = Pairs(pairs.sequences, labels, pairs.margin)
  rank = np.where(labels[:, None] == 1.0, [[1, 2]], [[2, 1]])
  rankings = Rankings(pairs.sequences, rank, np.ones((4, 2), bool))
  ours, slopes = tabular.direct_loss(DenseCPLConfig(), outputs, rankings)
  expected, expected_slopes = tabular.direct_loss(CPLConfig(), outputs, pairs)
  np.testing.assert_allclose(ours, expected, rtol=1e-6)
  np.testing.assert_allclose(slopes['logprobs'], expected_slopes['logprobs'], rtol=1e-5)


def test_which_pairs_count() -> None:
  """The better of two that are there and were told apart stands first."""
  _, ordered = dense_cpl(
    jnp.zeros((1, 4)),
    jnp.array([[2, 1, 2, 3]]),
    jnp.array([[True, True, True, False]]),
    lam=0.5,
  )
  np.testing.assert_array_equal(np.argwhere(ordered[0]), [[1, 0], [1, 2]])


@pytest.mark.parametrize(
  ('settings', 'field'),
  [
    ({'alpha': 0.0}, 'alpha'),
    ({'lam': 0.0}, 'lam'),
    ({'lam': 1.1}, 'lam'),
    ({'gamma': 0.0}, 'gamma'),
    ({'bc_coefficient': -1.0}, 'bc_coefficient'),
  ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], field: str) -> None:
  """The error has the field's dotted name."""
  assert_refused(DenseCPLConfig, settings, field)
