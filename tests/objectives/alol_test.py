"""A-LoL against Baheti et al. 2024, section 3, worked in float64 NumPy."""

from typing import Any

import numpy as np
import pytest

from rlhf_jax.common.errors import DataError
from rlhf_jax.objectives.alol import VARIANTS, ALoLConfig, alol, curate
from tests.objectives import tabular
from tests.objectives.settings import assert_refused
from tests.objectives.tabular import assert_equals_slow_loss, make_batch, make_outputs


def constants_of(config: ALoLConfig, batch: Any, logprobs: np.ndarray) -> np.ndarray:
  """The importance weight of every token, cut to 1 +- clip, `[B, R]`."""
  mask = batch.sequences.response_mask
  weights = np.ones(logprobs.shape)
  for b, t in np.ndindex(*mask.shape):
    ratios = (logprobs[b] - batch.reference_logprobs[b].astype(np.float64)) * mask[b]
    if config.variant == 'sequence':
      weights[b, t] = np.exp(ratios.sum())
    elif config.variant == 'token':
      weights[b, t] = np.exp(ratios[t])
  return np.clip(weights, 1 - config.clip, 1 + config.clip)


def slow(config: ALoLConfig, batch: Any, weights: np.ndarray, logprobs: np.ndarray) -> float:
  """Row by row, with the importance weights as constants."""
  losses = []
  for b, advantage in enumerate(batch.score):
    tokens = np.flatnonzero(batch.sequences.response_mask[b])
    loss = -advantage * sum(weights[b, t] * logprobs[b, t] for t in tokens)
    if config.variant == 'kl':
      reference = batch.reference_logprobs[b].astype(np.float64)
      loss += config.kl_coefficient * sum(logprobs[b, t] - reference[t] for t in tokens)
    losses.append(loss)
  return float(np.mean(losses))


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('clip', [0.05, 0.9])
def test_the_loss_equals_the_paper(variant: str, clip: float) -> None:
  """Mean over responses; no gradient by the importance weights, clipped or not."""
  batch, outputs = make_batch('ratings'), make_outputs('ratings')
  config = ALoLConfig(variant=variant, clip=clip, kl_coefficient=0.3)
  weights = constants_of(config, batch, outputs['logprobs'].astype(np.float64))
  if clip == 0.05 and variant in ('sequence', 'token'):
    assert (weights[batch.sequences.response_mask] == 1 + clip).any()
  assert_equals_slow_loss(
    config, batch, outputs, lambda x: slow(config, batch, weights, x['logprobs']), 'logprobs'
  )


def test_a_clipped_weight_still_pulls() -> None:
  """PPO's surrogate stops where the ratio leaves its range; this one goes on at its edge."""
  batch, outputs = make_batch('ratings'), make_outputs('ratings')
  outputs['logprobs'] = batch.reference_logprobs + 1.0
  config = ALoLConfig(variant='token', clip=0.2)
  _, slopes = tabular.direct_loss(config, outputs, batch)
  mask = batch.sequences.response_mask
  expected = np.where(mask, -batch.score[:, None] * 1.2 / len(mask), 0.0)
  np.testing.assert_allclose(slopes['logprobs'], expected, rtol=1e-5, atol=1e-7)


SCORES = np.array([1.0, 3.0, 2.0, -1.0])
BASELINES = np.array([2.0, 1.0, 1.5, -1.0])


@pytest.mark.parametrize(
  ('sampling', 'weights'), [('advantage', [0.0, 2.0, 0.5, 0.0]), ('uniform', None)]
)
def test_rows_without_a_positive_advantage_go(sampling: str, weights: Any) -> None:
  """Advantages in the place of scores; rows are drawn in proportion to them, or alike."""
  curated = curate(ALoLConfig(sampling=sampling), SCORES, lambda: BASELINES)
  np.testing.assert_allclose(curated.scores, [-1.0, 2.0, 0.5, 0.0])
  np.testing.assert_array_equal(curated.keep, [False, True, True, False])
  if weights is None:
    assert curated.weights is None
  else:
    assert curated.weights is not None
    np.testing.assert_allclose(curated.weights, weights)


def test_data_that_is_nowhere_better_is_refused() -> None:
  """Nothing would be left to learn from."""
  with pytest.raises(DataError, match='no response has a positive advantage'):
    curate(ALoLConfig(), SCORES, lambda: SCORES)


def test_an_unknown_variant_is_refused() -> None:
  """Where the formula is chosen."""
  batch = make_batch('ratings')
  with pytest.raises(ValueError, match="variant 'word': expected one of"):
    alol(
      batch.reference_logprobs,
      batch.reference_logprobs,
      batch.sequences.response_mask,
      batch.score,
      variant='word',
      clip=0.9,
      kl_coefficient=0.1,
    )


@pytest.mark.parametrize(
  ('settings', 'field'),
  [
    ({'variant': 'word'}, 'variant'),
    ({'sampling': 'score'}, 'sampling'),
    ({'clip': 0.0}, 'clip'),
    ({'kl_coefficient': 0.0}, 'kl_coefficient'),
  ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], field: str) -> None:
  """The error has the field's dotted name."""
  assert_refused(ALoLConfig, settings, field)
