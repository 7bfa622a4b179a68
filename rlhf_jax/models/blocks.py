"""A decoder's blocks run one after the other: unrolled or scanned, with a cache or without.

Their parameters are stacked along a leading axis `[L, ...]`, in one stack or two (`decoder`).
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.models import attending, rotary
from rlhf_jax.models.cache import Cache
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.layers import Block
from rlhf_jax.ops.attention import attention
from rlhf_jax.sharding.mesh import constrain_batch

Array = jax.Array
Params = dict[str, Any]


class Context(NamedTuple):
  """What a layer needs to know of the tokens.

  Attributes:
    mask: `[B, T, S]` bool, which columns each token sees.
    real: `[B, S]` bool, columns that hold real tokens; int32 where a row has several texts
      (`attending.attend`).
    rotation: of queries and keys; None: positions are learned.
    branches: of responses that share a prompt, whose columns `mask` and `real` are of then; None:
      there are none.
  """

  mask: Array
  real: Array
  rotation: rotary.Rotation | None
  branches: attending.Branches | None = None


# Keyed by whether a layer is windowed; only the kinds that there are.
ByKind = dict[bool, Context]
_Layer = Callable[[Params, Array, Context], Array]


def run(
  config: ModelConfig, params: Params, x: Array, context: ByKind, cache: Cache | None
) -> tuple[Array, Cache | None]:
  """Runs all blocks.

  Args:
    config: the architecture.
    params: a decoder's, of which the stacks are read.
    x: `[B, T, width]`, what the lowest block reads.
    context: what layers of each kind need to know of the tokens.
    cache: where keys and values of the new columns are written; None: there is none.

  Returns:
    `[B, T, width]`, what the highest block writes; and the cache with the new columns.
  """
  return (_scan if config.scanned else _unroll)(config, params, x, context, cache)


def unstack_layers(params: Params) -> Params:
  """Parts the stacked blocks, so that a loop around the decoder does not slice them every time.

  What comes back is good for `hidden_states` and `logits` with `scan_layers` off, for nothing else.
  """
  if isinstance(params['layers'], tuple):
    return params
  parts = [
    jax.tree.map(operator.itemgetter(i), stack)
    for stack in _stacks(params)
    for i in range(_depth(stack))
  ]
  rest = {name: tree for name, tree in params.items() if name != 'top_layers'}
  return rest | {'layers': tuple(parts)}


def _layer(
  config: ModelConfig,
  write: Callable[..., tuple[Array, ...]] | None = None,
  *,
  local: bool | None = None,
) -> _Layer:
  """The function of one layer.

  Args:
    config: the architecture.
    write: stores new keys and values and returns all there are; None: there is no cache.
    local: whether the layer sees a window; None: the context alone tells, which differs by layer.
  """
  window = config.window if local else None

  def apply(params: Params, x: Array, context: Context) -> Array:
    run: Callable[..., Any] = functools.partial(Block(config).apply, {'params': params})
    query, *stored = run(x, context.rotation, method='project')
    if write is not None:
      stored = write(*stored)
    if write is None:
      masks: dict[str, Any] = dict(mask=context.mask, real=context.real)
      attend = functools.partial(attending.attend, config, **masks, window=window)
      if context.branches is not None:
        masks['branches'] = context.branches
        attend = functools.partial(attending.attend_branches, config, **masks, window=window)
    else:
      attend = functools.partial(
        attention,
        mask=context.mask,
        scale=config.attention_scale,
        softcap=config.attention_softcap,
      )
    return constrain_batch(run(x, query, *stored, attend, method='finish'))

  if config.remat_policy == 'none' or write is not None:
    return apply
  policies = jax.checkpoint_policies
  policy = {
    'dots': policies.dots_with_no_batch_dims_saveable,
    'full': policies.nothing_saveable,
  }[config.remat_policy]
  # Without the barrier the compiler may undo the recomputation; a scan is a barrier of its own.
  return jax.checkpoint(apply, policy=policy, prevent_cse=not config.scanned)


def _stacks(params: Params) -> list[Any]:
  """Parameters of blocks stacked along their leading axis, from the lowest up."""
  return [params[name] for name in ('layers', 'top_layers') if name in params]


def _depth(stack: Any) -> int:
  return jax.tree.leaves(stack)[0].shape[0]


def _unroll(
  config: ModelConfig, params: Params, x: Array, context: ByKind, cache: Cache | None
) -> tuple[Array, Cache | None]:
  """Layers one by one; a cache is one array a layer, each updated in place."""
  parts = unstack_layers(params)['layers']
  kinds = config.is_local()
  if cache is None:
    by_kind = {local: _layer(config, local=local) for local in context}
    for layer, local in zip(parts, kinds, strict=True):
      x = by_kind[local](layer, x, context[local])
    return x, None
  start = (0, 0, cache.index, 0)
  written: list[tuple[Array, ...]] = []
  for *old, layer, local in zip(cache.keys, cache.values, parts, kinds, strict=True):

    def write(*new: Array, old: list[Any] = old) -> tuple[Array, ...]:
      both = zip(old, new, strict=True)
      written.append(tuple(jax.lax.dynamic_update_slice(a, b, start) for a, b in both))
      return written[-1]

    x = _layer(config, write)(layer, x, context[local])
  keys, values = zip(*written, strict=True)
  return x, dataclasses.replace(cache, keys=keys, values=values)


def _scan(
  config: ModelConfig, params: Params, x: Array, context: ByKind, cache: Cache | None
) -> tuple[Array, Cache | None]:
  """Layers by one compiled block; a cache is carried whole, and only new columns are written."""
  # One scan a stack: gradients then stop at the lowest block of those that are trained.
  stacks = _stacks(params)
  bounds = list(itertools.accumulate(map(_depth, stacks), initial=0))
  numbers = [jnp.arange(*ends) for ends in itertools.pairwise(bounds)]

  def pick(local: Array) -> Context:
    if len(context) == 1:
      return next(iter(context.values()))
    return jax.tree.map(lambda a, b: jnp.where(local, a, b), context[True], context[False])

  kinds = jnp.asarray(config.is_local())
  if cache is None:
    apply = _layer(config, local=next(iter(context)) if len(context) == 1 else None)

    def step(x: Array, layer: Any) -> tuple[Array, None]:
      return apply(layer[0], x, pick(layer[1])), None

    for stack, layers in zip(stacks, numbers, strict=True):
      x, _ = jax.lax.scan(step, x, (stack, kinds[layers]))
    return x, None
  index = cache.index

  def cached_step(carry: Any, layer: Any) -> tuple[Any, None]:
    x, *stored = carry
    block, local, i = layer

    def write(*new: Array) -> tuple[Array, ...]:
      for which, part in enumerate(new):
        stored[which] = jax.lax.dynamic_update_slice(stored[which], part[None], (i, 0, 0, index, 0))
      return tuple(jax.lax.dynamic_index_in_dim(whole, i, keepdims=False) for whole in stored)

    x = _layer(config, write)(block, x, pick(local))
    return (x, *stored), None

  carry = (x, cache.keys, cache.values)
  for stack, layers in zip(stacks, numbers, strict=True):
    carry, _ = jax.lax.scan(cached_step, carry, (stack, kinds[layers], layers))
  x, keys, values = carry
  return x, dataclasses.replace(cache, keys=keys, values=values)
