"""Masked attention with grouped key and value heads, in plain XLA."""

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import check_shapes

Array = jax.Array


def attention(
  query: Array,
  key: Array,
  value: Array,
  mask: Array,
  *,
  scale: float,
  softcap: float | None = None,
) -> Array:
  """Softmax attention of `H` query heads over `K` key and value heads, `H` a multiple of `K`.

  Heads come before positions, so that a decoding step reads a cache without transposing it.
  Query head h uses key head h // (H / K) (Ainslie et al. 2023). Scores and softmax are float32.
  A query that may see nothing gets the mean of all values: finite, and of no use to anyone.

  Args:
    query: `[B, H, T, D]`.
    key: `[B, K, S, D]`.
    value: `[B, K, S, D]`.
    mask: `[B, T, S]` bool, True where query t may see key s.
    scale: factor on the scores, usually D ** -0.5.
    softcap: if given, scores become softcap * tanh(score / softcap) (Gemma 2, section 2).

  Returns:
    `[B, H, T, D]` in the type of `value`.

  Raises:
    ShapeError: shapes disagree.
    ValueError: H is not a multiple of K.
  """
  sizes = check_shapes(
    'query:BHTD key:BKSD value:BKSD mask:BTS', query=query, key=key, value=value, mask=mask
  )
  heads, kv_heads = sizes['H'], sizes['K']
  if heads % kv_heads:
    raise ValueError(f'{heads} query heads cannot share {kv_heads} key heads evenly.')
  grouped = query.reshape(sizes['B'], kv_heads, heads // kv_heads, sizes['T'], sizes['D'])
  scores = jnp.einsum('bkgtd,bksd->bkgts', grouped, key, preferred_element_type=jnp.float32)
  scores = scores * scale
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  # The lowest float rather than -inf: a row without any True stays finite, in its gradient too.
  scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  mixed = jnp.einsum('bkgts,bksd->bkgtd', weights, value)
  return mixed.reshape(query.shape)
