"""CPL against the equations of its paper (Hejna et al. 2023), in float64 NumPy."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.checks import ShapeError
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.objectives.cpl import CPLConfig, cpl
from rlhf_jax.objectives.dpo import DPOConfig
from tests import numerical, quick
from tests.objectives import tabular
from tests.objectives.tabular import DIRECT, R

RNG = np.random.default_rng(0)
SCORES: Any = RNG.normal(-2, 3, (6, 2))
PREFERENCE: Any = np.array([1.0, 1.0, 0.5, 0.7, 0.0, 1.0])


def slow_cpl(scores: np.ndarray, preference: np.ndarray, lam: float) -> np.ndarray:
  """-log of exp S+ / (exp S+ + exp(lam S-)), eq. 6; a soft label mixes both verdicts."""
  out = np.zeros(len(scores))
  for i, (first, second) in enumerate(scores):
    wins = np.exp(first) / (np.exp(first) + np.exp(lam * second))
    loses = np.exp(second) / (np.exp(second) + np.exp(lam * first))
    out[i] = -preference[i] * np.log(wins) - (1 - preference[i]) * np.log(loses)
  return out


@functools.partial(jax.jit, static_argnums=1)
def fast_cpl(scores: Any, lam: float, preference: Any = PREFERENCE) -> jax.Array:
  """The function under test."""
  return cpl(jnp.asarray(scores, jnp.float32), jnp.asarray(preference, jnp.float32), lam=lam)


every_lam = pytest.mark.parametrize('lam', [1.0, 0.5, 0.1])


@every_lam
def test_values_and_gradients_equal_equation_6(lam: float) -> None:
  """Hard and soft labels, a tie, a reversed label; the derivative by central differences."""
  losses = fast_cpl(SCORES, lam)
  assert losses.dtype == jnp.float32
  np.testing.assert_allclose(losses, slow_cpl(SCORES, PREFERENCE, lam), rtol=1e-5, atol=1e-6)
  slopes = quick.jit(jax.grad(lambda s: fast_cpl(s, lam).sum()))(SCORES.astype(np.float32))
  expected = numerical.gradient(lambda s: slow_cpl(s, PREFERENCE, lam).sum(), SCORES)
  np.testing.assert_allclose(slopes, expected, rtol=1e-4, atol=1e-6)


@every_lam
def test_the_gradient_by_hand(lam: float) -> None:
  """With w = sigmoid(lam S- - S+): -w by the preferred score, lam w by the dispreferred one."""
  slopes = quick.jit(jax.grad(lambda s: fast_cpl(s, lam, np.ones(6)).sum()))(
    SCORES.astype(np.float32)
  )
  w = 1 / (1 + np.exp(SCORES[:, 0] - lam * SCORES[:, 1]))
  np.testing.assert_allclose(slopes, np.stack([-w, lam * w], 1), rtol=1e-5)


@every_lam
def test_equals_the_released_code(lam: float) -> None:
  """`biased_bce_with_logits(adv1, adv2, y, bias)`, whose y = 1 says that the second is better."""
  adv1, adv2, y = SCORES[:, 0], SCORES[:, 1], 1 - PREFERENCE
  logit21, logit12 = adv2 - lam * adv1, adv1 - lam * adv2
  max21, max12 = np.maximum(-logit21, 0), np.maximum(-logit12, 0)
  nlp21 = np.log(np.exp(-max21) + np.exp(-logit21 - max21)) + max21
  nlp12 = np.log(np.exp(-max12) + np.exp(-logit12 - max12)) + max12
  np.testing.assert_allclose(
    fast_cpl(SCORES, lam), y * nlp21 + (1 - y) * nlp12, rtol=1e-5, atol=1e-6
  )


@every_lam
def test_exchanging_segments_and_labels_changes_nothing(lam: float) -> None:
  """The loss of (1, 2, p) is that of (2, 1, 1 - p): lam follows the dispreferred segment."""
  mirrored = fast_cpl(SCORES[:, ::-1], lam, 1 - PREFERENCE)
  np.testing.assert_allclose(mirrored, fast_cpl(SCORES, lam), rtol=1e-5, atol=1e-6)


def test_the_bias_is_on_the_dispreferred_segment() -> None:
  """S+ = -2, S- = -4, lam 0.5: the logit is 0 and the loss log 2; lam 1 gives log(1 + e^-2).

  With lam on the preferred segment the logit would have been 3.
  """
  scores, label = np.array([[-2.0, -4.0]]), np.ones(1)
  np.testing.assert_allclose(fast_cpl(scores, 0.5, label), np.log(2), rtol=1e-6)
  np.testing.assert_allclose(fast_cpl(scores, 1.0, label), np.log1p(np.exp(-2)), rtol=1e-6)


def test_the_bias_prefers_likelier_pairs() -> None:
  """Conservatism: at equal gaps the loss falls as both segments grow likelier.

  Unbiased CPL only sees the gap.
  """
  likely, unlikely = np.array([[-1.0, -2.0]]), np.array([[-11.0, -12.0]])
  label = np.ones(1)
  assert fast_cpl(likely, 0.5, label)[0] < fast_cpl(unlikely, 0.5, label)[0]
  np.testing.assert_allclose(
    fast_cpl(likely, 1.0, label), fast_cpl(unlikely, 1.0, label), rtol=1e-6
  )


@pytest.mark.parametrize('size', [1e4, -1e4])
def test_gradients_are_finite_at_extreme_scores(size: float) -> None:
  """No overflow at 10,000 nats."""
  far = jnp.array([[size, -size]], jnp.float32)
  evaluate = quick.jit(jax.value_and_grad(lambda s: fast_cpl(s, 0.5, np.ones(1)).sum()))
  loss, slopes = evaluate(far)
  assert np.isfinite(loss) and np.isfinite(slopes).all()


def slow_loss(config: CPLConfig, batch: Any, logprobs: np.ndarray) -> float:
  """Eq. 5-6 token by token: S = sum_t gamma^t alpha log pi, t counted within the response."""
  total = 0.0
  for b, p in enumerate(batch.preference.astype(np.float64)):
    scores, nll = [], []
    for which in (0, 1):
      tokens = np.flatnonzero(batch.sequences.response_mask[b, which])
      terms = [logprobs[b, which, t] for t in tokens]
      nll.append(-sum(terms) / len(terms))
      if config.use_reference:
        terms = [
          x - batch.reference_logprobs[b, which, t] for t, x in zip(tokens, terms, strict=True)
        ]
      scores.append(sum(config.gamma**t * config.alpha * x for t, x in enumerate(terms)))
    total += slow_cpl(np.array([scores]), np.array([p]), config.lam)[0]
    imitated = nll[0] if config.bc_responses == 'chosen' and p > 0.5 else sum(nll) / 2
    total += config.bc_coefficient * imitated
  return float(total)


@pytest.mark.parametrize(
  'config',
  [
    CPLConfig(),
    CPLConfig(gamma=0.9, lam=0.75, bc_coefficient=0.3, bc_responses='chosen'),
    CPLConfig(use_reference=True, bc_coefficient=1.0),
    CPLConfig(alpha=2.0, gamma=0.5, lam=1.0, use_reference=True),
  ],
  ids=['default', 'discounted, imitating chosen', 'kl, imitating all', 'kl, discounted, unbiased'],
)
def test_the_loss_equals_equations_5_and_6(config: CPLConfig) -> None:
  """Alpha, lambda, gamma, log-ratios, the cloning term (ties: of both), and their gradients."""
  batch, outputs = tabular.make_batch('comparisons'), tabular.make_outputs('comparisons')
  mean, metrics, slopes = tabular.evaluator(config, DIRECT)(outputs, batch)
  wide = outputs['logprobs'].astype(np.float64)
  np.testing.assert_allclose(mean.total, slow_loss(config, batch, wide), rtol=1e-5)
  assert mean.weight == len(batch.preference)
  expected = numerical.gradient(lambda x: slow_loss(config, batch, x), wide)
  np.testing.assert_allclose(slopes['logprobs'], expected, rtol=1e-4, atol=1e-6)
  assert 0 <= metrics['accuracy'].value() <= 1


def test_cloning_full_segments_is_the_released_codes_mean() -> None:
  """Where all segments have one length, the term is -mean of all actions' log-probs."""
  batch, outputs = tabular.make_batch('comparisons'), tabular.make_outputs('comparisons')
  full = dataclasses.replace(
    batch.sequences, response_mask=np.ones_like(batch.sequences.response_mask)
  )
  config = CPLConfig(use_reference=True, bc_coefficient=1.0)
  _, metrics, _ = tabular.evaluator(config, DIRECT)(
    outputs, dataclasses.replace(batch, sequences=full)
  )
  np.testing.assert_allclose(metrics['bc_nll'].value(), -outputs['logprobs'].mean(), rtol=1e-5)


def test_unbiased_cpl_on_log_ratios_is_dpo() -> None:
  """With lam 1, gamma 1 and the reference, CPL is DPO with beta = alpha."""
  batch, outputs = tabular.make_batch('comparisons'), tabular.make_outputs('comparisons')
  config = CPLConfig(alpha=0.1, lam=1.0, use_reference=True)
  as_cpl = tabular.evaluator(config, DIRECT)(outputs, batch)
  as_dpo = tabular.evaluator(DPOConfig(beta=0.1), DIRECT)(outputs, batch)
  np.testing.assert_allclose(as_cpl[0].total, as_dpo[0].total, rtol=1e-6)
  np.testing.assert_allclose(as_cpl[2]['logprobs'], as_dpo[2]['logprobs'], rtol=1e-5)


def test_scores_are_reported_without_the_bias() -> None:
  """Alpha times summed log-probs of either segment; accuracy compares the unbiased scores."""
  batch, outputs = tabular.make_batch('comparisons'), tabular.make_outputs('comparisons')
  _, metrics, _ = tabular.evaluator(CPLConfig(), DIRECT)(outputs, batch)
  sums = np.where(batch.sequences.response_mask, outputs['logprobs'], 0).sum(-1)
  values = {name: float(metric.value()) for name, metric in metrics.items()}
  for column, name in enumerate(('chosen', 'rejected')):
    np.testing.assert_allclose(values[f'{name}_score'], 0.1 * sums[:, column].mean(), rtol=1e-5)
    np.testing.assert_allclose(values[f'{name}_logprob'], sums[:, column].mean(), rtol=1e-5)
  decided = batch.preference != 0.5
  np.testing.assert_allclose(values['accuracy'], (sums[:, 0] > sums[:, 1])[decided].mean())


def test_integers_and_wrong_shapes_are_refused() -> None:
  """Scores and labels must be floating-point, `[B, 2]` and `[B]`."""
  with pytest.raises(ShapeError, match='scores: expected a floating-point array'):
    cpl(jnp.zeros((3, 2), int), jnp.ones(3), lam=1.0)
  with pytest.raises(ShapeError, match='preference: axis B'):
    cpl(jnp.zeros((3, 2)), jnp.ones(R + 1), lam=1.0)


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('alpha', 0.0),
    ('lam', 0.0),
    ('lam', 1.5),
    ('gamma', 0.0),
    ('gamma', 1.01),
    ('bc_coefficient', -0.1),
    ('bc_responses', 'rejected'),
    ('bc_normalization', 'batch'),
  ],
)
def test_impossible_settings_are_named(field: str, value: Any) -> None:
  """The error has the field's dotted name."""
  with pytest.raises(ConfigError) as error:
    CPLConfig(**{field: value}).validate('objective')
  assert error.value.field == f'objective.{field}'
  CPLConfig().validate('objective')
