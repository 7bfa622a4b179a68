"""Best-of-n fine-tuning: which samples are kept, and that they are imitated."""

from typing import Any

import numpy as np
import pytest

from rlhf_jax.common import trees
from rlhf_jax.objectives.best_of_n import BestOfNConfig
from rlhf_jax.objectives.sft import SFTConfig
from tests.objectives import tabular
from tests.objectives.samples import SCORES, collect, make_experience
from tests.objectives.settings import assert_refused
from tests.objectives.tabular import assert_equals_slow_loss, make_batch, make_outputs


@pytest.mark.parametrize(
  ('samples', 'keep', 'rows'), [(2, 1, [0, 3]), (4, 1, [3]), (4, 2, [3, 0]), (4, 3, [3, 0, 2])]
)
def test_the_best_of_each_prompt_are_kept(samples: int, keep: int, rows: list[int]) -> None:
  """Whole, the best first."""
  experience = make_experience()
  kept, carry, metrics = collect(BestOfNConfig(samples=samples, keep=keep), experience)
  for name, values in trees.flatten(experience.sequences).items():
    np.testing.assert_array_equal(getattr(kept, name), values[rows])
  np.testing.assert_allclose(metrics['kept_score'], SCORES[rows].mean())
  assert carry == {}


def test_of_equal_scores_the_first_is_kept() -> None:
  """Whichever they are."""
  experience = make_experience(scores=np.array([1.0, 2.0, 2.0, 0.0], np.float32))
  kept, _, _ = collect(BestOfNConfig(samples=4), experience)
  np.testing.assert_array_equal(kept.response, experience.sequences.response[1:2])


def test_what_is_kept_is_imitated() -> None:
  """The mean negative log-likelihood of tokens, as in SFT; values and gradients."""
  batch, outputs = make_batch('demonstrations'), make_outputs('demonstrations')

  def slow(x: dict[str, np.ndarray]) -> float:
    return float(-np.mean([x['logprobs'][tuple(i)] for i in np.argwhere(batch.response_mask)]))

  assert_equals_slow_loss(BestOfNConfig(), batch, outputs, slow, 'logprobs')
  ours, expected = (
    tabular.direct_loss(config, outputs, batch)[0] for config in (BestOfNConfig(), SFTConfig())
  )
  assert ours == expected


@pytest.mark.parametrize(
  ('settings', 'field'),
  [
    ({'samples': 1}, 'samples'),
    ({'keep': 0}, 'keep'),
    ({'samples': 4, 'keep': 4}, 'keep'),
    ({'sample_from': 'policies'}, 'sample_from'),
    ({'epochs': 0}, 'epochs'),
    ({'minibatches': 0}, 'minibatches'),
  ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], field: str) -> None:
  """There is no best of one, and keeping all is no choice."""
  assert_refused(BestOfNConfig, settings, field)
