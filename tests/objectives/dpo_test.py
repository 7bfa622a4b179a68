"""DPO and its relatives, values and gradients, against float64 NumPy."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.checks import ShapeError
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.objectives.dpo import VARIANTS, DPOConfig, dpo
from tests import numerical, quick
from tests.objectives import tabular

RNG = np.random.default_rng(0)
LOGRATIOS: Any = RNG.normal(0, 4, (6, 2))
PREFERENCE: Any = np.array([1.0, 1.0, 0.5, 0.7, 0.0, 1.0])
BETA = 0.3


def sigmoid(x: float) -> float:
  """As in the papers."""
  return 1 / (1 + np.exp(-x))


# The loss of the verdict 'the first is better' for h, the difference of log-ratios.
EQUATIONS: dict[tuple[str, float], Callable[[float], float]] = {
  # Rafailov et al. 2023, eq. 7.
  ('sigmoid', 0.0): lambda h: -np.log(sigmoid(BETA * h)),
  # cDPO (Mitchell 2023): the label is flipped with probability e.
  ('sigmoid', 0.1): lambda h: -0.9 * np.log(sigmoid(BETA * h)) - 0.1 * np.log(sigmoid(-BETA * h)),
  # Chowdhury et al. 2024: unbiased under flips, ((1-e) L(h) - e L(-h)) / (1 - 2e).
  ('robust', 0.1): lambda h: (
    (0.9 * -np.log(sigmoid(BETA * h)) - 0.1 * -np.log(sigmoid(-BETA * h))) / 0.8
  ),
  # Azar et al. 2023, eq. 17.
  ('ipo', 0.0): lambda h: (h - 1 / (2 * BETA)) ** 2,
  # Zhao et al. 2023.
  ('hinge', 0.0): lambda h: max(0.0, 1 - BETA * h),
}
every_equation = pytest.mark.parametrize(('variant', 'smoothing'), EQUATIONS)


def slow(
  variant: str, smoothing: float, logratios: np.ndarray, preference: np.ndarray
) -> np.ndarray:
  """Pair by pair: the loss of either verdict, weighted with its labelled probability."""
  verdict = EQUATIONS[variant, smoothing]
  return np.array(
    [
      p * verdict(first - second) + (1 - p) * verdict(second - first)
      for (first, second), p in zip(logratios, preference, strict=True)
    ]
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def fast(variant: str, smoothing: float, logratios: Any, preference: Any = PREFERENCE) -> jax.Array:
  """The function under test."""
  return dpo(
    jnp.asarray(logratios, jnp.float32),
    jnp.asarray(preference, jnp.float32),
    beta=BETA,
    variant=variant,
    label_smoothing=smoothing,
  )


@every_equation
def test_values_and_gradients_equal_the_papers(variant: str, smoothing: float) -> None:
  """Each variant with hard and soft labels, ties and a reversed label, and its derivative."""
  losses = fast(variant, smoothing, LOGRATIOS)
  assert losses.dtype == jnp.float32
  expected = slow(variant, smoothing, LOGRATIOS, PREFERENCE)
  np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
  slopes = quick.jit(jax.grad(lambda x: fast(variant, smoothing, x).sum()))(
    LOGRATIOS.astype(np.float32)
  )
  by_hand = numerical.gradient(lambda x: slow(variant, smoothing, x, PREFERENCE).sum(), LOGRATIOS)
  np.testing.assert_allclose(slopes, by_hand, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_dpo_by_hand() -> None:
  """beta sigma(-beta h), pushing the first up and the second down (Rafailov et al. 2023, eq. 8)."""
  slopes = quick.jit(jax.grad(lambda x: fast('sigmoid', 0.0, x, np.ones(6)).sum()))(
    LOGRATIOS.astype(np.float32)
  )
  weight = BETA * sigmoid(-BETA * (LOGRATIOS[:, 0] - LOGRATIOS[:, 1]))
  np.testing.assert_allclose(slopes, np.stack([-weight, weight], 1), rtol=1e-5)


@every_equation
def test_exchanging_responses_and_labels_changes_nothing(variant: str, smoothing: float) -> None:
  """The loss of (1, 2, p) is that of (2, 1, 1 - p)."""
  mirrored = fast(variant, smoothing, LOGRATIOS[:, ::-1], 1 - PREFERENCE)
  np.testing.assert_allclose(mirrored, fast(variant, smoothing, LOGRATIOS), rtol=1e-5, atol=1e-6)


def test_the_reference_itself_loses_log_two() -> None:
  """At the start, policy = reference: log 2, also with label smoothing, for every label."""
  for variant, smoothing in (('sigmoid', 0.0), ('sigmoid', 0.2), ('robust', 0.2)):
    np.testing.assert_allclose(fast(variant, smoothing, np.zeros((6, 2))), np.log(2), rtol=1e-6)


def test_a_tie_pulls_a_pair_together() -> None:
  """With p = 0.5 every variant's gradient vanishes at equal log-ratios and opposes any gap."""
  tie, equal, apart = np.full(1, 0.5), np.zeros((1, 2)), np.array([[5.0, -5.0]])
  for variant in VARIANTS:
    slope = quick.jit(jax.grad(lambda x, v=variant: fast(v, 0.0, x, tie).sum()))
    np.testing.assert_allclose(slope(jnp.asarray(equal, jnp.float32)), 0.0, atol=1e-7)
    assert slope(jnp.asarray(apart, jnp.float32))[0, 0] > 0


def test_robust_is_unbiased_and_conservative_is_not() -> None:
  """The expected robust loss over labels flipped with probability e is the loss of true labels."""
  e, clean = 0.1, np.asarray(fast('sigmoid', 0.0, LOGRATIOS, np.ones(6)))

  def noisy(variant: str) -> np.ndarray:
    kept, flipped = (
      np.asarray(fast(variant, e, LOGRATIOS[:, order], np.ones(6)))
      for order in (slice(None), slice(None, None, -1))
    )
    return (1 - e) * kept + e * flipped

  np.testing.assert_allclose(noisy('robust'), clean, rtol=1e-4, atol=1e-5)
  assert not np.allclose(noisy('sigmoid'), clean, rtol=0.05)


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('size', [1e4, -1e4])
def test_gradients_are_finite_at_extreme_log_ratios(variant: str, size: float) -> None:
  """No overflow at 10,000 nats; a lost pair keeps its full gradient beta, a won one has none."""
  far = jnp.array([[size, -size]], jnp.float32)
  evaluate = quick.jit(jax.value_and_grad(lambda x: fast(variant, 0.0, x, np.ones(1)).sum()))
  losses, slopes = evaluate(far)
  assert np.isfinite(losses) and np.isfinite(slopes).all()
  if variant in ('sigmoid', 'robust', 'hinge'):
    np.testing.assert_allclose(slopes[0, 0], 0.0 if size > 0 else -BETA, atol=1e-6)


def slow_loss(config: DPOConfig, batch: Any, logprobs: np.ndarray) -> float:
  """The total over pairs of a config's loss, token by token, pair by pair."""
  total = 0.0
  for b, p in enumerate(batch.preference.astype(np.float64)):
    ratios, nll = [], []
    for which in (0, 1):
      tokens = np.flatnonzero(batch.sequences.response_mask[b, which])
      ratio = sum(logprobs[b, which, t] - batch.reference_logprobs[b, which, t] for t in tokens)
      ratios.append(ratio / len(tokens) if config.reduction == 'mean' else ratio)
      nll.append(-sum(logprobs[b, which, t] for t in tokens) / len(tokens))
    h = ratios[0] - ratios[1]
    if config.variant == 'ipo':
      win, lose = ((x - 1 / (2 * config.beta)) ** 2 for x in (h, -h))
    else:
      win, lose = (-numerical.log_sigmoid(config.beta * x) for x in (h, -h))
    imitated = nll[0] if p > 0.5 else sum(nll) / 2
    total += p * win + (1 - p) * lose + config.nll_coefficient * imitated
  return float(total)


@pytest.mark.parametrize(
  'config',
  [
    DPOConfig(),
    DPOConfig(variant='ipo', reduction='mean', nll_coefficient=0.5),
    DPOConfig(reduction='mean', nll_coefficient=0.2),
  ],
  ids=['sum', 'ipo, mean, nll', 'mean, nll'],
)
def test_the_loss_reduces_tokens_and_averages_over_pairs(config: DPOConfig) -> None:
  """Sum or mean of token log-ratios, optional likelihood term (ties: of both), and gradients."""
  batch, outputs = tabular.make_batch('comparisons'), tabular.make_outputs('comparisons')
  mean, metrics, slopes = tabular.evaluator(config, tabular.DIRECT)(outputs, batch)
  wide = outputs['logprobs'].astype(np.float64)
  np.testing.assert_allclose(mean.total, slow_loss(config, batch, wide), rtol=1e-5)
  assert mean.weight == len(batch.preference)
  expected = numerical.gradient(lambda x: slow_loss(config, batch, x), wide)
  np.testing.assert_allclose(slopes['logprobs'], expected, rtol=1e-4, atol=1e-6)
  sums = np.where(batch.sequences.response_mask, wide, 0).sum(-1)
  np.testing.assert_allclose(metrics['chosen_logprob'].value(), sums[:, 0].mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics['rejected_logprob'].value(), sums[:, 1].mean(), rtol=1e-5)


def test_implicit_rewards_are_reported() -> None:
  """beta log pi / pi_ref of either response, their margin, and accuracy over undecided labels."""
  batch, outputs = tabular.make_batch('comparisons'), tabular.make_outputs('comparisons')
  _, metrics, _ = tabular.evaluator(DPOConfig(), tabular.DIRECT)(outputs, batch)
  mask = batch.sequences.response_mask
  rewards = 0.1 * np.where(mask, outputs['logprobs'] - batch.reference_logprobs, 0).sum(-1)
  values = {name: float(metric.value()) for name, metric in metrics.items()}
  np.testing.assert_allclose(values['chosen_implicit_reward'], rewards[:, 0].mean(), rtol=1e-5)
  np.testing.assert_allclose(values['rejected_implicit_reward'], rewards[:, 1].mean(), rtol=1e-5)
  margin = rewards[:, 0] - rewards[:, 1]
  np.testing.assert_allclose(values['implicit_reward_margin'], margin.mean(), rtol=1e-5)
  np.testing.assert_allclose(values['accuracy'], (margin[batch.preference != 0.5] > 0).mean())


def test_integers_and_wrong_shapes_are_refused() -> None:
  """Log-ratios and labels must be floating-point, `[B, 2]` and `[B]`."""
  with pytest.raises(ShapeError, match='logratios: expected a floating-point array'):
    dpo(jnp.zeros((3, 2), int), jnp.ones(3), beta=0.1)
  with pytest.raises(ShapeError, match='preference: expected a floating-point array'):
    dpo(jnp.zeros((3, 2)), jnp.ones(3, int), beta=0.1)
  with pytest.raises(ShapeError, match='preference: axis B'):
    dpo(jnp.zeros((3, 2)), jnp.ones(2), beta=0.1)
  with pytest.raises(ValueError, match="variant 'kto': expected one of"):
    dpo(jnp.zeros((3, 2)), jnp.ones(3), beta=0.1, variant='kto')


@pytest.mark.parametrize(
  ('settings', 'field'),
  [
    ({'beta': 0.0}, 'beta'),
    ({'variant': 'kto'}, 'variant'),
    ({'reduction': 'max'}, 'reduction'),
    ({'reference': 'none'}, 'reference'),
    ({'label_smoothing': 0.5}, 'label_smoothing'),
    ({'label_smoothing': -0.1}, 'label_smoothing'),
    ({'label_smoothing': 0.1, 'variant': 'ipo'}, 'label_smoothing'),
    ({'label_smoothing': 0.1, 'variant': 'hinge'}, 'label_smoothing'),
    ({'nll_coefficient': -1.0}, 'nll_coefficient'),
    ({'nll_normalization': 'batch'}, 'nll_normalization'),
  ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], field: str) -> None:
  """The error has the field's dotted name."""
  with pytest.raises(ConfigError) as error:
    DPOConfig(**settings).validate('objective')
  assert error.value.field == f'objective.{field}'
  DPOConfig().validate('objective')
