"""Token log-probabilities and entropies from logits, always in float32."""

import jax
import jax.numpy as jnp

Array = jax.Array


def token_logprobs(logits: Array, tokens: Array) -> Array:
  """Log-probs of given tokens.

  Args:
    logits: `[..., V]`, any floating type; position t must already speak of `tokens[..., t]`.
    tokens: `[...]` int32.

  Returns:
    `[...]` float32, `log softmax(logits)[token]`.
  """
  logits = logits.astype(jnp.float32)
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


def entropy(logits: Array) -> Array:
  """Entropy in nats, `[..., V] -> [...]` float32; a logit of -inf contributes exactly 0."""
  logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  probs = jnp.exp(logprobs)
  return -jnp.where(probs > 0, probs * logprobs, 0.0).sum(-1)
