"""KL divergences of a policy from its reference: Monte-Carlo estimators and the exact value.

With `r = reference(token) / policy(token)` and tokens drawn from the policy (J. Schulman,
"Approximating KL divergence", 2020):

  k1 = -log r                 unbiased, high variance, can be negative
  k2 = (log r)^2 / 2          biased, low variance
  k3 = r - 1 - log r          unbiased, low variance, never negative
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def k1(logprobs: Array, reference_logprobs: Array) -> Array:
  """`log policy - log reference` of each token, `[...]` float32."""
  return logprobs - reference_logprobs


def k2(logprobs: Array, reference_logprobs: Array) -> Array:
  """Half the squared log-ratio, `[...]` float32."""
  return 0.5 * jnp.square(logprobs - reference_logprobs)


def k3(logprobs: Array, reference_logprobs: Array) -> Array:
  """`exp(d) - 1 - d` with `d = log reference - log policy`, `[...]` float32."""
  difference = reference_logprobs - logprobs
  return jnp.expm1(difference) - difference


def exact_kl(logits: Array, reference_logits: Array) -> Array:
  """KL(policy || reference) of two categorical distributions, `[..., V] x2 -> [...]` float32."""
  logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  reference = jax.nn.log_softmax(reference_logits.astype(jnp.float32), axis=-1)
  probs = jnp.exp(logprobs)
  return jnp.where(probs > 0, probs * (logprobs - reference), 0.0).sum(-1)
