"""Token log-probs and entropies against float64 NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.logprobs import entropy, token_logprobs
from tests import numerical, quick

RNG = np.random.default_rng(0)
LOGITS: Any = RNG.normal(0, 3, (2, 3, 7))
TOKENS: Any = RNG.integers(0, 7, (2, 3))


def slow_logprobs(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
  """Probabilities by their definition, one position at a time, in float64."""
  out = np.zeros(tokens.shape)
  for index in np.ndindex(tokens.shape):
    weights = np.exp(logits[index] - logits[index].max())
    out[index] = np.log(weights[tokens[index]] / weights.sum())
  return out


def test_values_and_gradients_equal_the_definition() -> None:
  """log softmax(logits)[token], and its gradient by central differences."""
  actual = quick.jit(token_logprobs)(jnp.asarray(LOGITS, jnp.float32), jnp.asarray(TOKENS))
  assert actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, slow_logprobs(LOGITS, TOKENS), rtol=1e-5, atol=1e-6)
  slopes = quick.jit(jax.grad(lambda x: token_logprobs(x, jnp.asarray(TOKENS)).sum()))(
    jnp.asarray(LOGITS, jnp.float32)
  )
  expected = numerical.gradient(lambda x: slow_logprobs(x, TOKENS).sum(), LOGITS)
  np.testing.assert_allclose(slopes, expected, atol=1e-5)


def test_bfloat16_logits_are_normalised_in_float32() -> None:
  """The result is that of the same numbers in float32: no bfloat16 in the log-sum-exp."""
  half = jnp.asarray(LOGITS, jnp.bfloat16)
  actual = token_logprobs(half, jnp.asarray(TOKENS))
  assert actual.dtype == jnp.float32
  np.testing.assert_array_equal(actual, token_logprobs(half.astype(jnp.float32), TOKENS))
  assert entropy(half).dtype == jnp.float32
  np.testing.assert_array_equal(entropy(half), entropy(half.astype(jnp.float32)))


@pytest.mark.parametrize('shift', [1e4, -1e4])
def test_a_shift_of_all_logits_changes_nothing(shift: float) -> None:
  """Large logits neither overflow nor underflow."""
  logits = jnp.asarray(np.round(LOGITS, 2), jnp.float32)
  shifted = token_logprobs(logits + shift, jnp.asarray(TOKENS))
  np.testing.assert_allclose(shifted, slow_logprobs(LOGITS, TOKENS), atol=2e-2)


def test_an_excluded_token_has_log_probability_minus_infinity() -> None:
  """A logit of -inf spoils neither the other tokens nor the entropy."""
  logits = jnp.array([0.0, 1.0, -jnp.inf])
  assert token_logprobs(logits, jnp.asarray(2)) == -jnp.inf
  p = 1 / (1 + np.exp(1.0))
  np.testing.assert_allclose(token_logprobs(logits, jnp.asarray(0)), np.log(p), rtol=1e-6)
  np.testing.assert_allclose(entropy(logits), -(p * np.log(p) + (1 - p) * np.log(1 - p)), rtol=1e-6)


def test_entropy() -> None:
  """-sum p log p in nats; log V when uniform, 0 when certain."""
  probs = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
  expected = -(probs * np.log(probs)).sum(-1)
  np.testing.assert_allclose(entropy(jnp.asarray(LOGITS, jnp.float32)), expected, rtol=1e-5)
  np.testing.assert_allclose(entropy(jnp.zeros(7)), np.log(7), rtol=1e-6)
  assert entropy(jnp.array([1e4, 0.0, 0.0])) == 0.0
