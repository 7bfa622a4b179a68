"""KL estimators: unbiased where they are said to be, by enumerating every outcome."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import kl

Estimator = Callable[[jax.Array, jax.Array], jax.Array]
RNG = np.random.default_rng(0)
V = 6
LOGITS, REFERENCE = RNG.normal(0, 1.5, (2, V))


def normalised(logits: np.ndarray) -> np.ndarray:
  """Log-probabilities in float64."""
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


POLICY, REF = normalised(LOGITS), normalised(REFERENCE)
PROBS = np.exp(POLICY)
EXACT = float((PROBS * (POLICY - REF)).sum())


def on_every_token(estimator: Estimator) -> np.ndarray:
  """What an estimator says of each of the V tokens."""
  return np.asarray(estimator(jnp.asarray(POLICY, jnp.float32), jnp.asarray(REF, jnp.float32)))


@pytest.mark.parametrize('estimator', [kl.k1, kl.k3])
def test_k1_and_k3_are_unbiased(estimator: Estimator) -> None:
  """Their expectation over the policy's tokens, enumerated, is the exact KL."""
  np.testing.assert_allclose((PROBS * on_every_token(estimator)).sum(), EXACT, rtol=1e-5)


def test_k2_is_biased_and_what_it_is() -> None:
  """k2 is half the squared log-ratio; its expectation is not the KL."""
  np.testing.assert_allclose(on_every_token(kl.k2), (POLICY - REF) ** 2 / 2, rtol=1e-5)
  assert abs((PROBS * on_every_token(kl.k2)).sum() / EXACT - 1) > 0.02


def test_k2_and_k3_are_never_negative_and_k1_is() -> None:
  """k3 >= 0 token by token even where k1 is negative, with less variance than k1."""
  k1, k2, k3 = (on_every_token(estimator) for estimator in (kl.k1, kl.k2, kl.k3))
  assert (k1 < 0).any() and (k2 >= 0).all() and (k3 >= 0).all()

  def variance(x: np.ndarray) -> float:
    return float((PROBS * x**2).sum() - (PROBS * x).sum() ** 2)

  close_ref = normalised(LOGITS + 0.1 * (REFERENCE - LOGITS))
  near = [np.asarray(f(jnp.asarray(POLICY), jnp.asarray(close_ref))) for f in (kl.k1, kl.k3)]
  assert variance(near[1]) < 0.05 * variance(near[0])


def test_equal_distributions_have_no_divergence() -> None:
  """Exactly 0, in every estimator and exactly."""
  x = jnp.asarray(POLICY, jnp.float32)
  for estimator in (kl.k1, kl.k2, kl.k3):
    np.testing.assert_array_equal(estimator(x, x), 0.0)
  assert kl.exact_kl(jnp.asarray(LOGITS), jnp.asarray(LOGITS)) == 0.0


def test_k3_keeps_small_divergences() -> None:
  """For a log-ratio of 1e-4 it is 5e-9: exp(d) - 1 in float32 would be all rounding error."""
  value = kl.k3(jnp.float32(1e-4), jnp.float32(0.0))
  np.testing.assert_allclose(value, np.expm1(-1e-4) + 1e-4, rtol=2e-2)


def test_exact_kl_equals_the_sum_over_the_vocabulary() -> None:
  """For any leading axes, from unnormalised logits of any floating type, in float32."""
  logits, reference = RNG.normal(0, 2, (2, 3, 4, V))
  p, q = normalised(logits), normalised(reference)
  expected = (np.exp(p) * (p - q)).sum(-1)
  actual = kl.exact_kl(jnp.asarray(logits + 7, jnp.float32), jnp.asarray(reference, jnp.float32))
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
  half = kl.exact_kl(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(reference, jnp.bfloat16))
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, expected, rtol=0.1, atol=0.05)


def test_tokens_that_the_policy_excludes_cost_nothing() -> None:
  """0 log 0 = 0; mass where the reference has none is an infinite divergence."""
  certain, even = jnp.array([0.0, -jnp.inf]), jnp.array([0.0, 0.0])
  np.testing.assert_allclose(kl.exact_kl(certain, even), np.log(2), rtol=1e-6)
  assert kl.exact_kl(even, certain) == jnp.inf


def test_summed_token_kl_is_the_sequence_kl() -> None:
  """Chain rule: E of the summed exact (or k1) token KLs is the KL between sequences.

  Two tokens from a Markov chain; all V^2 sequences are enumerated.
  """
  first, first_ref = normalised(RNG.normal(0, 1, (2, V)))
  then, then_ref = normalised(RNG.normal(0, 1, (2, V, V)))
  joint, joint_ref = first[:, None] + then, first_ref[:, None] + then_ref
  expected = (np.exp(joint) * (joint - joint_ref)).sum()
  exact = (
    float(kl.exact_kl(jnp.asarray(first), jnp.asarray(first_ref)))
    + (np.exp(first) * np.asarray(kl.exact_kl(jnp.asarray(then), jnp.asarray(then_ref)))).sum()
  )
  k1 = np.asarray(kl.k1(jnp.asarray(first), jnp.asarray(first_ref)))[:, None] + np.asarray(
    kl.k1(jnp.asarray(then), jnp.asarray(then_ref))
  )
  np.testing.assert_allclose(exact, expected, rtol=1e-5)
  np.testing.assert_allclose((np.exp(joint) * k1).sum(), expected, rtol=1e-5)
