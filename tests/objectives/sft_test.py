"""SFT is the mean negative log-likelihood of response tokens."""

import numpy as np
import pytest

from rlhf_jax.common.checks import ShapeError
from rlhf_jax.objectives import sft
from rlhf_jax.objectives.sft import SFTConfig
from tests.objectives import tabular


def test_loss_and_gradient_by_hand() -> None:
  """-sum(log-probs) / tokens over all rows; every token's gradient is -1 / tokens, prompts none."""
  batch, outputs = tabular.make_batch('demonstrations'), tabular.make_outputs('demonstrations')
  mask = batch.response_mask
  mean, metrics, slopes = tabular.evaluator(SFTConfig(), tabular.DIRECT)(outputs, batch)
  kept = outputs['logprobs'][mask].astype(np.float64)
  np.testing.assert_allclose(mean.total, -kept.sum(), rtol=1e-6)
  assert mean.weight == mask.sum() == 10
  np.testing.assert_array_equal(slopes['logprobs'], np.where(mask, -1.0, 0.0))
  np.testing.assert_allclose(metrics['nll'].value(), -kept.mean(), rtol=1e-6)
  np.testing.assert_allclose(metrics['entropy'].value(), outputs['entropy'][mask].mean(), rtol=1e-6)
  np.testing.assert_allclose(metrics['sequence_logprob'].value(), kept.sum() / 4, rtol=1e-6)


def test_pairs_are_refused() -> None:
  """A batch of another kind is a shape error, not a wrong mean."""
  pairs = tabular.make_batch('comparisons')
  with pytest.raises(ShapeError, match='mask: expected 2 axes'):
    sft.loss(SFTConfig(), tabular.TABLES, tabular.make_tables(), pairs.sequences)
