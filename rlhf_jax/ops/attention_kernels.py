"""Attention by other people's kernels, each with the meaning of `ops.attention.attention`.

None holds the `[B, H, T, S]` scores. What a query that stands for padding gets means nothing, and
differs from one kernel to another. A kernel works on what one device holds: on a mesh the caller
maps it over rows and heads.
"""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

# Lanes of a TPU's vector registers: splash attention reads so many columns at least.
_LANES = 128


def cudnn(query: Array, key: Array, value: Array, mask: Array, *, scale: float) -> Array:
  """Flash attention of NVIDIA's cuDNN, through `jax.nn`; bfloat16 or float16, on a GPU.

  Args:
    query: `[B, H, T, D]`, D a multiple of 8, at most 128 (256 from Hopper on).
    key: `[B, K, S, D]`.
    value: `[B, K, S, D]`.
    mask: `[B, T, S]` bool.
    scale: factor on the scores.

  Returns:
    `[B, H, T, D]`.
  """
  length = query.shape[2]
  # With a mask its backward pass wants even numbers of queries and of columns.
  arrays, mask = _make_even((query, key, value), _seeing(mask))
  query, key, value = (x.swapaxes(1, 2) for x in arrays)
  mixed = jax.nn.dot_product_attention(
    query, key, value, mask=mask[:, None], scale=scale, implementation='cudnn'
  )
  return mixed.swapaxes(1, 2)[:, :, :length]


def tokamax(
  query: Array,
  key: Array,
  value: Array,
  mask: Array,
  *,
  scale: float,
  softcap: float | None = None,
) -> Array:
  """The kernel that tokamax finds fit for the device: Mosaic, Triton, or plain XLA.

  Args:
    query: `[B, H, T, D]`.
    key: `[B, K, S, D]`.
    value: `[B, K, S, D]`.
    mask: `[B, T, S]` bool.
    scale: factor on the scores.
    softcap: if given, scores become softcap * tanh(score / softcap).

  Returns:
    `[B, H, T, D]`.
  """
  import tokamax as library

  mixed = library.dot_product_attention(
    *(x.swapaxes(1, 2) for x in (query, key, value)),
    mask=_seeing(mask)[:, None],
    scale=scale,
    logits_soft_cap=softcap,
  )
  return mixed.swapaxes(1, 2).astype(value.dtype)


def splash(
  query: Array,
  key: Array,
  value: Array,
  real: Array,
  *,
  window: int | None,
  scale: float,
  softcap: float | None = None,
  interpret: bool = False,
) -> Array:
  """Splash attention, JAX's Pallas kernel for TPUs: blocks that a mask leaves empty are skipped.

  It takes no mask of rows by columns: a token sees the real tokens at or before its column, and of
  those the last `window` columns. That is a window of tokens where the real ones of a row stand
  together, as in a prompt padded on its left followed by a response padded on its right.

  Args:
    query: `[B, H, T, D]`, of the last T of the S columns.
    key: `[B, K, S, D]`.
    value: `[B, K, S, D]`.
    real: `[B, S]` bool, True at real tokens; or int32, the number of each token's text, 0 at
      padding: a token then sees its own text alone.
    window: how many columns a token sees, its own included; None: all.
    scale: factor on the scores.
    softcap: if given, scores become softcap * tanh(score / softcap).
    interpret: run the kernel's text on any device, slowly, to test it.

  Returns:
    `[B, H, T, D]`.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention

  heads, length = query.shape[1], query.shape[2]
  before = key.shape[2] - length
  query, key, value = (_pad(x, -x.shape[2] % _LANES, 2) for x in (query * scale, key, value))
  shape = (query.shape[2], key.shape[2])
  # Padding is a segment of its own: it sees itself, and nobody else sees it.
  of_queries, of_keys = (
    _pad(x, -x.shape[1] % _LANES, 1).astype(jnp.int32) for x in (real[:, before:], real)
  )
  mask = (
    splash_attention.CausalMask(shape, before)
    if window is None
    else splash_attention.LocalMask(shape, (window - 1, 0), before)
  )
  kernel = splash_attention.make_splash_mha(
    splash_attention.MultiHeadMask([mask] * heads),
    block_sizes=splash_attention.BlockSizes(**_blocks(*shape)),
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=softcap,
    interpret=interpret,
  )

  def one_row(query: Array, key: Array, value: Array, own: Array, seen: Array) -> Array:
    return kernel(query, key, value, splash_attention.SegmentIds(own, seen))

  mixed = jax.vmap(one_row)(query, key, value, of_queries, of_keys)
  return mixed[:, :, :length].astype(value.dtype)


def _blocks(queries: int, columns: int) -> dict[str, Any]:
  """Sizes of splash attention's blocks, the largest that divide."""
  of_queries, of_columns = (
    max(size for size in (128, 256, 512) if count % size == 0) for count in (queries, columns)
  )
  names = ('kv', 'kv_compute', 'kv_dkv', 'kv_dkv_compute', 'kv_dq')
  return {f'block_{name}': of_queries for name in ('q', 'q_dkv', 'q_dq')} | {
    f'block_{name}': of_columns for name in names
  }


def _seeing(mask: Array) -> Array:
  """Lets padding see itself: some kernels divide by zero where a query sees nothing."""
  queries, columns = mask.shape[1:]
  return mask | jnp.eye(queries, columns, columns - queries, dtype=bool)


def _pad(x: Array, count: int, axis: int) -> Array:
  return jnp.pad(x, [(0, count if i == axis else 0) for i in range(x.ndim)])


def _make_even(arrays: tuple[Array, Array, Array], mask: Array) -> tuple[list[Array], Array]:
  """Adds a column that nobody sees, and a query that sees what the last one does."""
  odd = [x.shape[2] % 2 for x in arrays]
  mask = _pad(mask, odd[1], 2)
  mask = jnp.concatenate([mask, mask[:, mask.shape[1] - odd[0] :]], axis=1)
  return [_pad(x, count, 2) for x, count in zip(arrays, odd, strict=True)], mask
