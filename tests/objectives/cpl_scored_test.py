"""CPL from scores: all pairs of a batch, or of its groups, worked in float64 NumPy."""

import itertools
from typing import Any

import numpy as np
import pytest

from rlhf_jax.common.rows import split_rows
from rlhf_jax.common.types import Ratings
from rlhf_jax.objectives.cpl_scored import ScoredCPLConfig, in_groups
from tests.numerical import log_sigmoid
from tests.objectives import tabular
from tests.objectives.settings import assert_refused
from tests.objectives.tabular import assert_equals_slow_loss, make_batch, make_outputs

CONFIGS = {
  'whole batch': ScoredCPLConfig(),
  'groups': ScoredCPLConfig(group_size=2, lam=0.75),
  'kl, discounted': ScoredCPLConfig(use_reference=True, gamma=0.9, alpha=0.3),
  'imitating, in groups': ScoredCPLConfig(group_size=2, bc_coefficient=0.4),
}


def slow(config: ScoredCPLConfig, batch: Any, logprobs: np.ndarray) -> float:
  """Pair by pair, group by group: each pair with its group's imitation term."""
  count = len(batch.score)
  groups = 1 if config.group_size == 0 else count // config.group_size
  scores, nll, losses = {}, {}, []
  for b in range(count):
    tokens = np.flatnonzero(batch.sequences.response_mask[b])
    terms = logprobs[b].copy()
    nll[b] = -terms[tokens].mean()
    if config.use_reference:
      terms -= batch.reference_logprobs[b]
    scores[b] = config.alpha * sum(config.gamma**t * terms[t] for t in tokens)
  for group in range(groups):
    members = range(group, count, groups)
    imitated = np.mean([nll[b] for b in members])
    for i, j in itertools.permutations(members, 2):
      if batch.score[i] > batch.score[j]:
        loss = -log_sigmoid(scores[i] - config.lam * scores[j])
        losses.append(loss + config.bc_coefficient * imitated)
  return float(np.mean(losses))


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_the_loss_is_the_mean_over_ordered_pairs(config: ScoredCPLConfig) -> None:
  """Equal scores make no pair, nor do those of other groups; values and gradients."""
  batch, outputs = make_batch('ratings'), make_outputs('ratings')
  assert_equals_slow_loss(
    config, batch, outputs, lambda x: slow(config, batch, x['logprobs']), 'logprobs'
  )
  score = np.array([1.0, 2.0, 1.0, 0.0], np.float32)
  tied = Ratings(batch.sequences, score, batch.reference_logprobs)
  mean, metrics, _ = tabular.evaluator(config, tabular.DIRECT)(outputs, tied)
  # Groups of two are rows 0 and 2, which are alike, and rows 1 and 3.
  assert mean.weight == (1 if config.group_size else 5)
  assert metrics['pair_accuracy'].weight == mean.weight


def test_microbatches_hold_whole_groups() -> None:
  """Groups of a microbatch are some of the batch's, whatever its size and the number of parts."""
  rows: Any = np.arange(24)
  for size, parts in itertools.product((2, 3, 4, 6), (1, 2)):
    whole = {tuple(group) for group in in_groups(rows, size).tolist()}
    found = [in_groups(part, size).tolist() for part in split_rows(rows, parts)]
    assert {tuple(group) for part in found for group in part} == whole
    assert sorted(itertools.chain(*whole)) == rows.tolist()
  assert in_groups(rows, 0).tolist() == [rows.tolist()]


@pytest.mark.parametrize(
  ('settings', 'field'),
  [
    ({'alpha': 0.0}, 'alpha'),
    ({'group_size': 1}, 'group_size'),
    ({'group_size': -2}, 'group_size'),
  ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], field: str) -> None:
  """The error has the field's dotted name."""
  assert_refused(ScoredCPLConfig, settings, field)
