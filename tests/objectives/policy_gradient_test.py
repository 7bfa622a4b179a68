"""What policy-gradient objectives share, values and gradients, against float64 NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.checks import ShapeError
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.types import Experience
from rlhf_jax.objectives import policy_gradient
from rlhf_jax.objectives.policy_gradient import (
  check_dual_clip,
  check_samples,
  check_updates,
  grouped,
  log_ratios,
  rollouts_of,
  sequence_kl,
)
from tests import numerical, quick
from tests.objectives import batches

clipped_surrogate = jax.jit(
  policy_gradient.clipped_surrogate, static_argnames=('clip_low', 'clip_high')
)

RNG = np.random.default_rng(0)
SHAPE = (5, 6)
OLD: Any = -2 + 0.5 * RNG.normal(0, 1, SHAPE)
NEW: Any = OLD + 0.4 * RNG.normal(0, 1, SHAPE)
ADVANTAGES: Any = RNG.normal(0, 1, SHAPE)
LOW, HIGH = 0.2, 0.3
CLIPS = {'clip_low': LOW, 'clip_high': HIGH}


def slow_surrogate(new: float, old: float, advantage: float) -> float:
  """-min(rho A, clip(rho) A) for one token (Schulman et al. 2017, eq. 7)."""
  ratio = np.exp(new - old)
  clipped = min(max(ratio, 1 - LOW), 1 + HIGH)
  return -min(ratio * advantage, clipped * advantage)


def every(function: Any, *arrays: np.ndarray) -> np.ndarray:
  """The scalar function at every entry."""
  return np.vectorize(function, otypes=[np.float64])(*arrays)


def floats(*arrays: np.ndarray) -> list[jax.Array]:
  """As float32 arrays of jax."""
  return [jnp.asarray(array, jnp.float32) for array in arrays]


def test_the_surrogate_equals_equation_7() -> None:
  """Values and gradients with ratios on both sides of both clips and advantages of both signs."""
  ratio = np.exp(NEW - OLD)
  for outside in (ratio < 1 - LOW, ratio > 1 + HIGH):
    assert (outside & (ADVANTAGES > 0)).any() and (outside & (ADVANTAGES < 0)).any()
  expected = every(slow_surrogate, NEW, OLD, ADVANTAGES)
  losses = clipped_surrogate(*floats(NEW, OLD, ADVANTAGES), **CLIPS)
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  slopes = quick.jit(
    jax.grad(lambda x: clipped_surrogate(x, *floats(OLD, ADVANTAGES), **CLIPS).sum())
  )(jnp.asarray(NEW, jnp.float32))
  by_hand = numerical.gradient(lambda x: every(slow_surrogate, x, OLD, ADVANTAGES).sum(), NEW)
  np.testing.assert_allclose(slopes, by_hand, rtol=1e-4, atol=1e-6)


def test_clipping_stops_only_what_went_too_far() -> None:
  """No gradient where the ratio already moved past the clip in the advantage's direction.

  Elsewhere it is -A rho, also far out on the wrong side: a bad move can always be taken back.
  """
  ratio = jnp.array([[1.5, 1.5, 0.5, 0.5, 1.1]])
  advantage = jnp.array([[1.0, -1.0, 1.0, -1.0, 1.0]])
  slopes = quick.jit(
    jax.grad(lambda x: clipped_surrogate(x, jnp.zeros_like(ratio), advantage, **CLIPS).sum())
  )(jnp.log(ratio))
  np.testing.assert_allclose(slopes, [[0.0, 1.5, -0.5, 0.0, -1.1]], rtol=1e-6)


def test_a_dual_clip_bounds_what_a_bad_move_costs() -> None:
  """-min(min(rho, c) A, clip(rho) A): beyond c a negative advantage has no gradient (Ye 2020)."""
  ratio = jnp.array([[1.5, 2.0, 4.0, 4.0, 0.5]])
  advantage = jnp.array([[-1.0, -2.0, -2.0, 1.0, -1.0]])

  def losses(x: jax.Array) -> jax.Array:
    return policy_gradient.clipped_surrogate(
      x, jnp.zeros_like(ratio), advantage, clip_low=LOW, clip_high=HIGH, dual_clip=3.0
    )

  np.testing.assert_allclose(losses(jnp.log(ratio)), [[1.5, 4.0, 6.0, -1.3, 0.8]], rtol=1e-6)
  slopes = quick.jit(jax.grad(lambda x: losses(x).sum()))(jnp.log(ratio))
  np.testing.assert_allclose(slopes, [[1.5, 4.0, 0.0, 0.0, 0.0]], rtol=1e-6)


def test_the_first_gradient_is_the_policy_gradient() -> None:
  """At ratio 1 the gradient is exactly minus the advantage."""
  old, advantages = floats(OLD, ADVANTAGES)
  slopes = quick.jit(jax.grad(lambda x: clipped_surrogate(x, old, advantages, **CLIPS).sum()))(old)
  np.testing.assert_array_equal(slopes, -advantages)


@pytest.mark.parametrize('advantage', [1.0, -1.0])
@pytest.mark.parametrize('size', [100.0, 1e4, -1e4])
def test_extreme_log_ratios_have_finite_losses_and_gradients(advantage: float, size: float) -> None:
  """A ratio that overflows float32 gives no nan, in particular not where it is clipped away."""
  far, zero, advantages = floats(
    np.full((1, 1), size), np.zeros((1, 1)), np.full((1, 1), advantage)
  )
  loss, slopes = quick.jit(
    jax.value_and_grad(lambda x: clipped_surrogate(x, zero, advantages, **CLIPS).sum())
  )(far)
  assert np.isfinite(loss) and np.isfinite(slopes).all()
  if (size > 0) == (advantage > 0):
    np.testing.assert_array_equal(slopes, 0.0)


def test_integer_advantages_and_wrong_shapes_are_refused() -> None:
  """They would have been truncated somewhere before."""
  ones = jnp.ones((2, 3))
  with pytest.raises(ShapeError, match='advantages: expected a floating-point array'):
    clipped_surrogate(ones, ones, ones.astype(int), **CLIPS)
  with pytest.raises(ShapeError, match='old: axis R'):
    clipped_surrogate(ones, ones[:, :2], ones, **CLIPS)


def test_metrics_describe_how_far_the_policy_moved() -> None:
  """Fraction beyond either clip, half the mean squared log-ratio, mean and extreme ratios."""
  mask = np.arange(6) < np.array([[6], [3], [1], [4], [2]])
  new, old = floats(NEW, OLD)
  metrics = policy_gradient.ratio_metrics(new, old, jnp.asarray(mask), clip_low=LOW, clip_high=HIGH)
  ratio = np.exp(NEW - OLD)[mask]
  expected = {
    'clip_fraction': ((ratio < 1 - LOW) | (ratio > 1 + HIGH)).mean(),
    'approximate_kl': 0.5 * (np.log(ratio) ** 2).mean(),
    'ratio': ratio.mean(),
    'ratio_max': ratio.max(),
    'ratio_min': ratio.min(),
    'first_ratio_deviation': abs(ratio - 1).max(),
  }
  assert set(metrics) == set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name].value(), value, rtol=1e-5, err_msg=name)


def make_experience(bad: float) -> Experience:
  """Samples whose log-probs are `bad` at masked positions."""
  batch = batches.garbage(batches.make_batch('rollouts'), bad, 0)
  scores = np.array([1.0, -0.5, 0.25, 2.0], np.float32)
  return Experience(batch.sequences, batch.old_logprobs, batch.reference_logprobs, scores)


@pytest.mark.parametrize('bad', [0.0, np.nan, np.inf])
def test_the_kl_of_samples_is_the_sum_of_their_log_ratios(bad: float) -> None:
  """log pi - log pi_ref of each real token; of a response their sum, in nats."""
  experience = make_experience(bad)
  mask = experience.sequences.response_mask
  expected = np.zeros(mask.shape)
  for b, t in zip(*np.nonzero(mask), strict=True):
    expected[b, t] = experience.old_logprobs[b, t] - experience.reference_logprobs[b, t]
  found, sums = quick.jit(lambda x: (log_ratios(x), sequence_kl(x)))(experience)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  np.testing.assert_allclose(sums, expected.sum(1), rtol=1e-5)


def test_rollouts_carry_advantages_of_responses_or_tokens() -> None:
  """One a response becomes one of each of its tokens; behind the end they are 0."""
  experience = make_experience(np.nan)
  mask = experience.sequences.response_mask
  whole = rollouts_of(experience, jnp.array([1.0, 2.0, 3.0, 4.0]))
  np.testing.assert_array_equal(
    whole.advantages, np.where(mask, np.array([[1.0], [2.0], [3.0], [4.0]]), 0.0)
  )
  tokens = rollouts_of(experience, jnp.full(mask.shape, 5.0))
  np.testing.assert_array_equal(tokens.advantages, np.where(mask, 5.0, 0.0))
  assert whole.old_values is None and whole.returns is None and whole.value_mask is None


def test_the_samples_of_a_prompt_are_adjacent() -> None:
  """Row k of the groups are samples K k to K k + K - 1."""
  np.testing.assert_array_equal(grouped(jnp.arange(6), 3), [[0, 1, 2], [3, 4, 5]])


def test_impossible_settings_are_named() -> None:
  """Passes, minibatches, clips and groups; nan is no clip."""
  for arguments, field in (
    ((0, 1, {}), 'epochs'),
    ((1, 0, {}), 'minibatches'),
    ((1, 1, {'clip': 0.0}), 'clip'),
    ((1, 1, {'clip_high': float('nan')}), 'clip_high'),
  ):
    with pytest.raises(ConfigError) as error:
      check_updates('objective', *arguments)
    assert error.value.field == f'objective.{field}'
  check_updates('objective', 1, 1, {'clip': 0.2})
  with pytest.raises(ConfigError, match='objective.samples.*1.*>= 2') as error:
    check_samples('objective', 1, 'There is nothing to compare.')
  assert error.value.field == 'objective.samples'
  assert 'There is nothing to compare.' in str(error.value)
  check_samples('objective', 2, '')
  with pytest.raises(ConfigError) as error:
    check_dual_clip('objective', 1.2, 0.2)
  assert error.value.field == 'objective.dual_clip'
  check_dual_clip('objective', 0.0, 0.2)
