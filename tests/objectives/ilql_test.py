"""ILQL against Snell et al. 2023, section 4, worked token by token in float64 NumPy."""

from typing import Any

import numpy as np
import pytest

from rlhf_jax.objectives.ilql import ILQLConfig, curate
from tests.objectives import tabular
from tests.objectives.settings import assert_refused
from tests.objectives.tabular import assert_equals_slow_loss, make_batch, make_outputs

CONFIGS = {
  'default': ILQLConfig(),
  'weighted': ILQLConfig(
    gamma=0.8, expectile=0.9, cql_coefficient=0.4, awac_coefficient=0.6, awac_beta=0.7
  ),
}


def slow(
  config: ILQLConfig, batch: Any, x: dict[str, np.ndarray], constants: dict[str, np.ndarray]
) -> dict[str, float]:
  """The four terms, means over response tokens; `constants` have no gradient."""
  terms: dict[str, list[float]] = {name: [] for name in ('q', 'v', 'cql', 'awac')}
  for b, score in enumerate(batch.score):
    tokens = np.flatnonzero(batch.sequences.response_mask[b])
    for t in tokens:
      reward = score if t == tokens[-1] else 0.0
      goal = reward + config.gamma * constants['next_values'][b, t]
      terms['q'].append(sum((x['q'][i, b, t] - goal) ** 2 for i in (0, 1)))
      advantage = constants['target_q'][b, t] - x['values'][b, t]
      weight = config.expectile if advantage > 0 else 1 - config.expectile
      terms['v'].append(weight * advantage**2)
      terms['cql'].append(x['q_nll'][0, b, t] + x['q_nll'][1, b, t])
      fixed = constants['target_q'][b, t] - constants['values'][b, t]
      terms['awac'].append(-np.exp(config.awac_beta * fixed) * x['logprobs'][b, t])
  return {name: float(np.mean(values)) for name, values in terms.items()}


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_the_loss_is_the_sum_of_its_terms(config: ILQLConfig) -> None:
  """Values and gradients: V by its expectile alone, Q by its goal and its softmax, and so on.

  Goals and weights are constants, so that next values and slow copies have no gradient.
  """
  batch, outputs = make_batch('ratings'), make_outputs('ratings')
  constants = {name: values.astype(np.float64) for name, values in outputs.items()}

  def total(x: dict[str, np.ndarray]) -> float:
    terms = slow(config, batch, x, constants)
    return (
      terms['q']
      + terms['v']
      + config.cql_coefficient * terms['cql']
      + config.awac_coefficient * terms['awac']
    )

  names = ('logprobs', 'values', 'q', 'q_nll')
  assert_equals_slow_loss(config, batch, outputs, total, *names)
  _, metrics, _ = tabular.evaluator(config, tabular.DIRECT)(outputs, batch)
  for name, value in slow(config, batch, constants, constants).items():
    np.testing.assert_allclose(metrics[f'{name}_loss'].value(), value, rtol=1e-5, err_msg=name)


def test_the_policy_alone_is_imitation() -> None:
  """With beta 0 the policy's gradient is that of the data's mean log-likelihood."""
  batch, outputs = make_batch('ratings'), make_outputs('ratings')
  _, slopes = tabular.direct_loss(ILQLConfig(), outputs, batch)
  mask = batch.sequences.response_mask
  np.testing.assert_allclose(slopes['logprobs'], np.where(mask, -1 / mask.sum(), 0.0), rtol=1e-6)


def test_scores_are_standardised_over_the_dataset() -> None:
  """Mean 0 and standard deviation 1 of the count less one; equal ones become 0; every row stays."""
  scores = np.array([1.0, 2.0, 4.0, 9.0])
  curated = curate(ILQLConfig(), scores, lambda: scores)
  np.testing.assert_allclose(curated.scores, (scores - 4.0) / np.sqrt((9 + 4 + 0 + 25) / 3))
  assert curated.keep.all() and curated.weights is None
  for alike in (np.ones(3), np.ones(1)):
    np.testing.assert_array_equal(curate(ILQLConfig(), alike, lambda: scores).scores, 0.0)
  plain = curate(ILQLConfig(whiten_scores=False), scores, lambda: scores)
  np.testing.assert_array_equal(plain.scores, scores)


@pytest.mark.parametrize(
  ('settings', 'field'),
  [
    ({'gamma': 0.0}, 'gamma'),
    ({'gamma': 1.1}, 'gamma'),
    ({'expectile': 1.0}, 'expectile'),
    ({'target_rate': 0.0}, 'target_rate'),
    ({'cql_coefficient': -1.0}, 'cql_coefficient'),
    ({'awac_coefficient': -1.0}, 'awac_coefficient'),
    ({'awac_beta': -1.0}, 'awac_beta'),
    ({'decode_beta': -1.0}, 'decode_beta'),
  ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], field: str) -> None:
  """The error has the field's dotted name."""
  assert_refused(ILQLConfig, settings, field)
