"""Statistics of masked arrays, in float32; under jit they are global over devices."""

import jax
import jax.numpy as jnp

Array = jax.Array


def masked_sum(values: Array, mask: Array, axis: int | tuple[int, ...] | None = None) -> Array:
  """Sum of `values` where `mask`; a masked nan or inf contributes exactly 0, and no gradient."""
  return jnp.where(mask, values, 0.0).astype(jnp.float32).sum(axis)


def masked_mean(values: Array, mask: Array, axis: int | tuple[int, ...] | None = None) -> Array:
  """Mean of `values` where `mask`; 0 where nothing is unmasked."""
  count = mask.astype(jnp.float32).sum(axis)
  return masked_sum(values, mask, axis) / jnp.maximum(count, 1.0)


def masked_variance(values: Array, mask: Array) -> Array:
  """Biased variance of `values` where `mask` (divides by the count, as OpenAI 2019 and N+ do)."""
  return masked_mean(jnp.square(values - masked_mean(values, mask)), mask)


def whiten(values: Array, mask: Array, *, keep_mean: bool, epsilon: float = 1e-8) -> Array:
  """Scales `values` to unit variance over `mask`, and to zero mean unless `keep_mean`.

  Rewards keep their mean, advantages do not (Ziegler et al. 2019, code; Huang et al. 2024).
  Masked entries come out as 0.
  """
  mean = masked_mean(values, mask)
  scaled = (values - mean) * jax.lax.rsqrt(masked_variance(values, mask) + epsilon)
  return jnp.where(mask, scaled + mean if keep_mean else scaled, 0.0)


def last_true(mask: Array) -> Array:
  """`[..., R]` bool -> `[...]` int32: the position of the last True; 0 where there is none."""
  positions = jnp.arange(mask.shape[-1], dtype=jnp.int32)
  return jnp.where(mask, positions, 0).max(-1)
