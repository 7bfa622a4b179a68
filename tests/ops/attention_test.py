"""Attention against a slow loop, and what it does at its edges."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.checks import ShapeError
from rlhf_jax.ops.attention import attention


def make_inputs(heads: int = 4, kv_heads: int = 2, dtype: str = 'float32') -> dict[str, Any]:
  """Random queries, keys and values, and a causal mask with some keys taken out."""
  rng = np.random.default_rng(0)
  B, T, S, D = 2, 5, 7, 8
  mask = (np.arange(S) <= np.arange(T)[:, None] + 2) & (rng.random((B, 1, S)) < 0.8)
  mask[:, :, 0] = True
  return {
    'query': jnp.asarray(rng.normal(0, 2, (B, heads, T, D)), dtype),
    'key': jnp.asarray(rng.normal(0, 2, (B, kv_heads, S, D)), dtype),
    'value': jnp.asarray(rng.normal(0, 1, (B, kv_heads, S, D)), dtype),
    'mask': jnp.asarray(mask),
  }


def slow_attention(
  query: np.ndarray,
  key: np.ndarray,
  value: np.ndarray,
  mask: np.ndarray,
  *,
  scale: float,
  softcap: float | None,
) -> np.ndarray:
  """One query and one head at a time, over the visible keys alone, in float64."""
  out = np.zeros(query.shape)
  group = query.shape[1] // key.shape[1]
  for b, h, t in np.ndindex(query.shape[:3]):
    seen = np.flatnonzero(mask[b, t])
    scores = np.array([scale * query[b, h, t] @ key[b, h // group, s] for s in seen])
    if softcap is not None:
      scores = softcap * np.tanh(scores / softcap)
    weights = np.exp(scores - scores.max())
    out[b, h, t] = (weights / weights.sum()) @ value[b, h // group, seen]
  return out


@pytest.mark.parametrize('softcap', [None, 3.0])
@pytest.mark.parametrize('kv_heads', [1, 2, 4])
def test_equals_a_slow_loop(kv_heads: int, softcap: float | None) -> None:
  """Grouped heads, mask, scale and soft-cap as the definition says."""
  inputs = make_inputs(kv_heads=kv_heads)
  expected = slow_attention(
    **{name: np.asarray(x, bool if name == 'mask' else float) for name, x in inputs.items()},
    scale=0.3,
    softcap=softcap,
  )
  actual = attention(**inputs, scale=0.3, softcap=softcap)
  np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_grouped_heads_equal_repeated_heads() -> None:
  """Sharing a key head is the same as giving each query head a copy of it."""
  inputs = make_inputs()
  shared = attention(**inputs, scale=0.3)
  for name in ('key', 'value'):
    inputs[name] = jnp.repeat(inputs[name], 2, axis=1)
  np.testing.assert_allclose(attention(**inputs, scale=0.3), shared, atol=1e-6)


def test_bfloat16_has_a_float32_softmax() -> None:
  """Low precision loses what rounding the inputs and the weights loses, no more."""
  inputs = make_inputs(dtype='bfloat16')
  wide = {k: v if k == 'mask' else v.astype(jnp.float32) for k, v in inputs.items()}
  low = attention(**inputs, scale=0.3)
  assert low.dtype == jnp.bfloat16
  np.testing.assert_allclose(low.astype(jnp.float32), attention(**wide, scale=0.3), atol=0.03)


def test_hidden_keys_and_blind_queries_are_harmless() -> None:
  """Keys nobody may see have exactly zero gradient; a query that sees nothing stays finite."""
  inputs = make_inputs()
  mask = inputs['mask'].at[:, :, 3].set(False).at[0, 2].set(False)

  def total(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    out = attention(query, key, value, mask, scale=0.3)
    return jnp.square(jnp.delete(out[0], 2, axis=1)).sum() + jnp.square(out[1]).sum()

  q, k, v = inputs['query'], inputs['key'], inputs['value']
  assert bool(jnp.isfinite(attention(q, k, v, mask, scale=0.3)).all())
  gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)
  assert all(bool(jnp.isfinite(g).all()) for g in gradients)
  assert not np.any(gradients[1][:, :, 3]) and not np.any(gradients[2][:, :, 3])
  assert not np.any(gradients[0][0, :, 2])


def test_refuses_what_does_not_fit() -> None:
  """Wrong shapes are named; heads that cannot be grouped are counted."""
  inputs = make_inputs()
  with pytest.raises(ShapeError, match='mask'):
    attention(**(inputs | {'mask': inputs['mask'][:, :-1]}), scale=1.0)
  three = inputs | {'query': inputs['query'][:, :3]}
  with pytest.raises(ValueError, match='3 query heads cannot share 2'):
    attention(**three, scale=1.0)
