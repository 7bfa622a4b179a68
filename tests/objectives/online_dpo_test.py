"""Online DPO: pairs of samples, worked in float64 NumPy."""

from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax.common import trees
from rlhf_jax.objectives.dpo import DPOConfig
from rlhf_jax.objectives.online_dpo import VARIANTS, OnlineDPOConfig
from tests.objectives import tabular
from tests.objectives.samples import SCORES, collect, make_experience
from tests.objectives.settings import assert_refused
from tests.objectives.tabular import assert_equals_slow_loss, make_batch, make_outputs


@pytest.mark.parametrize(('samples', 'rows'), [(2, [[0, 1], [3, 2]]), (4, [[3, 1]])])
def test_the_best_and_the_worst_make_a_pair(samples: int, rows: list[list[int]]) -> None:
  """Tokens, masks and the reference's log-probs of either, behind the prompt that all samples of a
  group have; the margin is what scores differ by."""
  experience = make_experience()
  pairs, carry, metrics = collect(OnlineDPOConfig(samples=samples), experience)
  for name, values in trees.flatten(experience.sequences).items():
    of_prompts = name.startswith('prompt')
    expected = values[::samples, None] if of_prompts else values[rows]
    np.testing.assert_array_equal(getattr(pairs.sequences, name), expected)
  np.testing.assert_array_equal(pairs.reference_logprobs, experience.reference_logprobs[rows])
  gaps = [SCORES[best] - SCORES[worst] for best, worst in rows]
  np.testing.assert_allclose(pairs.margin, gaps)
  np.testing.assert_array_equal(pairs.preference, 1.0)
  np.testing.assert_allclose(metrics['score_gap'], np.mean(gaps))
  assert metrics['equal_groups'] == 0.0 and carry == {}


def test_of_equal_scores_the_first_counts_and_equal_groups_have_no_weight() -> None:
  """A pair of margin 0 says nothing."""
  scores = np.array([1.0, 1.0, 2.0, 2.0], np.float32)
  config = OnlineDPOConfig(samples=4)
  experience = make_experience(scores=scores)
  pairs, _, _ = collect(config, experience)
  for which, row in enumerate((2, 0)):
    np.testing.assert_array_equal(
      pairs.sequences.response[0, which], experience.sequences.response[row]
    )
  alike, _, metrics = collect(OnlineDPOConfig(), experience)
  np.testing.assert_array_equal(alike.margin, 0.0)
  assert metrics['equal_groups'] == 1.0
  outputs = {name: x[:2] for name, x in make_outputs('online_pairs').items()}
  mean, _, slopes = tabular.evaluator(OnlineDPOConfig(), tabular.DIRECT)(outputs, alike)
  assert mean.total == mean.weight == 0.0
  np.testing.assert_array_equal(slopes['logprobs'], 0.0)


@pytest.mark.parametrize('variant', VARIANTS)
def test_the_loss_is_dpos_over_pairs_that_are_told_apart(variant: str) -> None:
  """Guo et al. 2024, eq. 2; values and gradients."""
  batch, outputs = make_batch('online_pairs'), make_outputs('online_pairs')
  config = OnlineDPOConfig(variant=variant, beta=0.4)

  def slow(x: dict[str, np.ndarray]) -> float:
    losses = []
    for b in np.flatnonzero(batch.margin > 0):
      mask = batch.sequences.response_mask[b]
      ratios = [
        (x['logprobs'][b, which] - batch.reference_logprobs[b, which])[mask[which]].sum()
        for which in (0, 1)
      ]
      h = ratios[0] - ratios[1]
      losses.append(
        {
          'sigmoid': np.log(1 + np.exp(-0.4 * h)),
          'ipo': (h - 1 / 0.8) ** 2,
          'hinge': max(0.0, 1 - 0.4 * h),
        }[variant]
      )
    return float(np.mean(losses))

  assert_equals_slow_loss(config, batch, outputs, slow, 'logprobs')
  # The same as DPO on these pairs alone.
  told = {name: x[batch.margin > 0] for name, x in outputs.items()}
  kept = jax.tree.map(lambda x: x[batch.margin > 0], batch)
  expected, _ = tabular.direct_loss(DPOConfig(variant=variant, beta=0.4), told, kept)
  loss, _ = tabular.direct_loss(config, outputs, batch)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_predicted_tie_is_half_right() -> None:
  """As in all accuracies: at the start, where policy and reference are one, it is a half."""
  batch, outputs = make_batch('online_pairs'), make_outputs('online_pairs')
  start = outputs | {'logprobs': batch.reference_logprobs}
  evaluate = tabular.evaluator(OnlineDPOConfig(), tabular.DIRECT)
  _, metrics, _ = evaluate(start, batch)
  # Three pairs of four are told apart.
  assert metrics['accuracy'].value() == 0.5 and metrics['accuracy'].weight == 3
  likelier = np.array([1.0, 1.0, -1.0, 0.0], np.float32)[:, None, None]
  first = np.array([1.0, 0.0], np.float32)[:, None]
  _, metrics, _ = evaluate({**start, 'logprobs': start['logprobs'] + likelier * first}, batch)
  np.testing.assert_allclose(metrics['accuracy'].value(), (1 + 0 + 0.5) / 3)


@pytest.mark.parametrize(
  ('settings', 'field'),
  [
    ({'samples': 1}, 'samples'),
    ({'epochs': 0}, 'epochs'),
    ({'minibatches': 0}, 'minibatches'),
    ({'beta': 0.0}, 'beta'),
    ({'variant': 'robust'}, 'variant'),
  ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], field: str) -> None:
  """A pair takes two."""
  assert_refused(OnlineDPOConfig, settings, field)
