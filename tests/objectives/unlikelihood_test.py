"""Unlikelihood against its two sources, worked in float64 NumPy."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives.unlikelihood import UnlikelihoodConfig, difference, unlikelihood
from tests.objectives import tabular
from tests.objectives.settings import assert_refused
from tests.objectives.tabular import assert_equals_slow_loss, make_batch, make_outputs


def slow(config: UnlikelihoodConfig, batch: Any, logprobs: np.ndarray) -> float:
  """Pair by pair, token by token."""
  losses = []
  for b, p in enumerate(batch.preference):
    likely, unlikely = [], []
    for which in (0, 1):
      tokens = logprobs[b, which][batch.sequences.response_mask[b, which]]
      likely.append(-sum(tokens))
      # Rafailov et al. 2023, section 6; Welleck et al. 2020, eq. 4.
      by_token = -sum(np.log(1 - np.exp(x)) for x in tokens)
      unlikely.append(sum(tokens) if config.variant == 'sequence' else by_token)
    first = likely[0] + config.alpha * unlikely[1]
    second = likely[1] + config.alpha * unlikely[0]
    losses.append(p * first + (1 - p) * second)
  return float(np.mean(losses))


@pytest.mark.parametrize('variant', ['sequence', 'token'])
@pytest.mark.parametrize('alpha', [0.0, 0.1, 1.0])
def test_the_loss_equals_its_source(variant: str, alpha: float) -> None:
  """Either variant, soft labels and a tie, values and gradients."""
  batch, outputs = make_batch('comparisons'), make_outputs('comparisons')
  outputs['logprobs'] = np.minimum(outputs['logprobs'], -0.05)
  config = UnlikelihoodConfig(variant=variant, alpha=alpha)
  assert_equals_slow_loss(
    config, batch, outputs, lambda x: slow(config, batch, x['logprobs']), 'logprobs'
  )


def test_a_certain_token_has_a_large_but_finite_loss() -> None:
  """log(1 - p) ends at p = 1 - 1e-6."""
  logprobs = jnp.array([[[-1.0], [0.0]]])
  loss = unlikelihood(logprobs, jnp.ones((1, 2, 1), bool), jnp.ones(1), alpha=1.0, variant='token')
  np.testing.assert_allclose(loss, 1.0 + 6 * np.log(10), rtol=1e-4)


def test_the_difference_is_that_of_the_responses_log_probs() -> None:
  """Nothing of alpha in it."""
  batch, outputs = make_batch('comparisons'), make_outputs('comparisons')
  totals = np.where(batch.sequences.response_mask, outputs['logprobs'], 0.0).sum(-1)
  found = difference(UnlikelihoodConfig(), tabular.DIRECT, outputs, batch)
  np.testing.assert_allclose(found, totals[:, 0] - totals[:, 1], rtol=1e-5)


@pytest.mark.parametrize(
  ('settings', 'field'),
  [({'alpha': -0.1}, 'alpha'), ({'alpha': 1.1}, 'alpha'), ({'variant': 'word'}, 'variant')],
)
def test_impossible_settings_are_named(settings: dict[str, Any], field: str) -> None:
  """The error has the field's dotted name."""
  assert_refused(UnlikelihoodConfig, settings, field)
