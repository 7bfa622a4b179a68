"""The decoder as pure functions over a plain nested dict of float32 parameters.

`params['layers']` holds the parameters of all blocks stacked along a leading axis `[L, ...]`,
whether the layers are then scanned or unrolled, so that a checkpoint serves both. Where the last
ones are trained apart from the others (`models/adapters.py`) they are in `params['top_layers']`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, overload

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import ShapeError, check_shapes
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.models import attending, blocks, rotary
from rlhf_jax.models.cache import Cache
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.layers import Block, Norm, named
from rlhf_jax.sharding.mesh import constrain, constrain_batch
from rlhf_jax.sharding.rules import DEFAULT_RULES

Array = jax.Array
Params = dict[str, Any]


def init(config: ModelConfig, key: Array) -> Params:
  """Float32 parameters; raises ConfigError while the vocabulary's size is not known."""
  return nn.meta.unbox(_init_boxed(config, key))


def logical_axes(config: ModelConfig) -> Params:
  """The tree of `init` with, for each parameter, a tuple of logical axis names (None: no name)."""
  boxed = jax.eval_shape(lambda: _init_boxed(config, jax.random.key(0)))
  specs = nn.get_partition_spec({key: value for key, value in boxed.items() if key != 'layers'})
  layers = nn.get_partition_spec(boxed['layers'])
  axes = jax.tree.map(tuple, specs, is_leaf=_is_spec)
  axes['layers'] = jax.tree.map(lambda spec: ('layers', *spec), layers, is_leaf=_is_spec)
  return axes


def decoding_params(config: ModelConfig, params: Params, *, gather: bool = False) -> Params:
  """Parameters as a decode loop wants them, for `hidden_states` and `logits` of the same config.

  What the loop would do at every step is done once: matrices get the compute type, and blocks that
  are unrolled are parted. Every result is the same.

  With `gather` weights are cut over the mesh's tensor axis alone, so that the loop does not bring
  together at every token what training cuts over fsdp.
  """

  def cast(path: Any, leaf: Array) -> Array:
    # Norms compute in float32, with float32 weights; they are the next to last name of a path.
    return leaf if path[-2:][0].key.endswith('norm') else leaf.astype(config.compute_dtype)

  params = jax.tree_util.tree_map_with_path(cast, params)
  if gather:
    params = _gather(config, params)
  return params if config.scanned else blocks.unstack_layers(params)


@overload
def hidden_states(
  config: ModelConfig,
  params: Params,
  tokens: Array,
  mask: Array,
  *,
  cache: None = None,
  segments: Array | None = None,
) -> tuple[Array, None]: ...


@overload
def hidden_states(
  config: ModelConfig, params: Params, tokens: Array, mask: Array, *, cache: Cache
) -> tuple[Array, Cache]: ...


def hidden_states(
  config: ModelConfig,
  params: Params,
  tokens: Array,
  mask: Array,
  *,
  cache: Cache | None = None,
  segments: Array | None = None,
) -> tuple[Array, Cache | None]:
  """Runs the blocks, each token seeing itself and the real tokens before it.

  A token's position is the number of real tokens before it, so padding on either side changes
  nothing. With a cache the tokens are appended to it, and see what it holds; the caller leaves
  room for them.

  Args:
    config: the architecture.
    params: from `init`.
    tokens: `[B, T]` int32.
    mask: `[B, T]` bool, True at real tokens; what comes out at others means nothing.
    cache: from `init_cache` or an earlier call.
    segments: `[B, T]` int32, where rows hold several texts end to end: the number of each real
      token's text, from 1. Tokens see their own text alone, and positions begin anew in each. None:
      a row is one text; so it is with a cache.

  Returns:
    `[B, T, width]` final hidden states in the compute type, ready for `logits` and scalar heads;
    and the new cache, None if none was given.

  Raises:
    ShapeError: tokens, mask and cache disagree, or the cache is too short.
    ConfigError: there are fewer learned positions than columns.
  """
  check_shapes('tokens:BT mask:BT', tokens=tokens, mask=mask)
  length = tokens.shape[1]
  _check_room(config, length, length if cache is None else cache.length)
  positions = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - mask
  if segments is not None:
    check_shapes('segments:BT tokens:BT', segments=segments, tokens=tokens)
    begins = jnp.diff(segments, axis=1, prepend=-1) != 0
    positions = positions - jax.lax.cummax(jnp.where(begins, positions, 0), axis=1)
  columns = jnp.where(mask, positions, -1)
  if cache is not None:
    check_shapes('cache:BS tokens:BT', cache=cache.column_positions, tokens=tokens)
    positions = positions + cache.positions[:, None]
    columns = jax.lax.dynamic_update_slice(
      cache.column_positions, jnp.where(mask, positions, -1), (0, cache.index)
    )
    seen = cache.positions + mask.sum(1, dtype=jnp.int32)
    cache = dataclasses.replace(cache, column_positions=columns, positions=seen)
  context = _context(config, columns, positions, segments)
  x, cache = _run(config, params, tokens, positions, context, cache)
  if cache is not None:
    cache = dataclasses.replace(cache, index=cache.index + length)
  return x, cache


def branched_states(
  config: ModelConfig,
  params: Params,
  prompt: Array,
  prompt_mask: Array,
  response: Array,
  response_mask: Array,
) -> tuple[Array, Array]:
  """Runs the blocks over rows of a prompt and several responses, each seeing the prompt and itself.

  The states are those that `hidden_states` gives of the prompt with each response alone; those of
  the prompt are made once.

  Args:
    config: the architecture.
    params: from `init`.
    prompt: `[B, P]` int32.
    prompt_mask: `[B, P]` bool, True at real tokens; what comes out at others means nothing.
    response: `[B, K, R]` int32.
    response_mask: `[B, K, R]` bool.

  Returns:
    final hidden states in the compute type, `[B, P, width]` of prompts and `[B, K, R, width]`.

  Raises:
    ShapeError: the arrays disagree.
    ConfigError: there are fewer learned positions than columns.
  """
  sizes = check_shapes(
    'prompt:BP prompt_mask:BP response:BKR response_mask:BKR',
    prompt=prompt,
    prompt_mask=prompt_mask,
    response=response,
    response_mask=response_mask,
  )
  rows, length, copies = sizes['B'], sizes['P'], sizes['K']
  _check_room(config, length + sizes['R'], length + sizes['R'])
  positions = jnp.cumsum(prompt_mask, axis=1, dtype=jnp.int32) - prompt_mask
  columns = jnp.where(prompt_mask, positions, -1)
  after = jnp.cumsum(response_mask, axis=2, dtype=jnp.int32) - response_mask
  after = after + prompt_mask.sum(1, dtype=jnp.int32)[:, None, None]
  # Each response as a row of its own, behind the columns of its prompt.
  own = after.reshape(rows * copies, -1)
  behind = jnp.where(response_mask.reshape(own.shape), own, -1)
  behind = jnp.concatenate([jnp.repeat(columns, copies, axis=0), behind], axis=1)
  context = _context(config, columns, positions)
  for local, branch in _context(config, behind, own).items():
    context[local] = context[local]._replace(
      branches=attending.Branches(branch.mask, branch.real),
      rotation=_rotation(config, _joined(positions, after), local=local),
    )
  tokens = _joined(prompt, response)
  x, _ = _run(config, params, tokens, _joined(positions, after), context, None)
  prompts, responses = jnp.split(x, [length], axis=1)
  return prompts, responses.reshape(*response.shape, config.width)


def logits(config: ModelConfig, params: Params, hidden: Array) -> Array:
  """Scores of the next token, `[..., width]` -> `[..., V]` float32."""
  if config.tied_embeddings:
    kernel = params['embedding'].T
  else:
    kernel = params['unembedding']
  scores = jnp.einsum(
    '...d,dv->...v', hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32
  )
  if config.logit_softcap is not None:
    scores = config.logit_softcap * jnp.tanh(scores / config.logit_softcap)
  return scores[..., : config.vocab_size]


def _gather(config: ModelConfig, params: Params) -> Params:
  """Lays parameters whole over all mesh axes but tensor."""
  cut = {logical for logical, axis in DEFAULT_RULES if axis == 'tensor'}
  axes = logical_axes(config)
  axes['top_layers'] = axes['layers']
  leaves = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
  names = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}

  def lay(path: Any, leaf: Array) -> Array:
    axes = names.get(jax.tree_util.keystr(path), (None,) * leaf.ndim)
    return constrain(leaf, *('tensor' if axis in cut else None for axis in axes))

  return jax.tree_util.tree_map_with_path(lay, params)


def _joined(prompt: Array, response: Array) -> Array:
  """`[B, P]` and `[B, K, R]` -> `[B, P + K R]`."""
  return jnp.concatenate([prompt, response.reshape(prompt.shape[0], -1)], axis=1)


def _run(
  config: ModelConfig,
  params: Params,
  tokens: Array,
  positions: Array,
  context: blocks.ByKind,
  cache: Cache | None,
) -> tuple[Array, Cache | None]:
  """From tokens to final hidden states."""
  x = constrain_batch(_embed(config, params, tokens, positions))
  x, cache = blocks.run(config, params, x, context, cache)
  if config.norm_placement != 'post':
    norm: Callable[..., Any] = _final_norm(config).apply
    x = norm({'params': params['final_norm']}, x)
  return x, cache


def _is_spec(leaf: object) -> bool:
  return isinstance(leaf, jax.sharding.PartitionSpec)


def _final_norm(config: ModelConfig) -> Norm:
  return Norm(config, config.norm, 'embed')


def _init_boxed(config: ModelConfig, key: Array) -> Params:
  if config.vocab_size < 1:
    raise ConfigError(
      'model.vocab_size',
      config.vocab_size,
      'the number of token ids',
      'It must be set, or filled in from the tokenizer, before parameters are made.',
    )
  names = ('embedding', 'positions', 'unembedding', 'layers')
  keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
  std = config.width**-0.5 if config.init_std is None else config.init_std
  normal = nn.initializers.normal(std)
  table = (config.padded_vocab_size, config.width)
  params = {'embedding': named(normal, ('vocab', 'embed'))(keys['embedding'], table)}
  if config.positions == 'learned':
    shape = (config.max_length, config.width)
    params['positions'] = named(normal, ('position', 'embed'))(keys['positions'], shape)
  if not config.tied_embeddings:
    params['unembedding'] = named(normal, ('embed', 'vocab'))(keys['unembedding'], table[::-1])
  x = jnp.zeros((1, 1, config.width))
  if config.norm_placement != 'post':
    params['final_norm'] = _final_norm(config).init(key, x)['params']
  by = rotary.rotation(config, jnp.zeros((1, 1), jnp.int32), local=False)
  block_keys = jax.random.split(keys['layers'], config.layers)
  params['layers'] = jax.vmap(
    lambda k: Block(config).init(k, x, by, lambda query, *_: query)['params']
  )(block_keys)
  return params


def _embed(config: ModelConfig, params: Params, tokens: Array, positions: Array) -> Array:
  # Rows must not be cut over fsdp, as the batch is that they are looked up for: the compiler could
  # lay the result out in no other way than by copying all of it to all devices.
  x = constrain(params['embedding'], 'tensor', None)[tokens].astype(config.compute_dtype)
  if config.embedding_scale != 1.0:
    # Rounded to the compute type first, as Gemma does.
    x = x * jnp.asarray(config.embedding_scale, config.compute_dtype)
  if config.positions == 'learned':
    x = x + constrain(params['positions'], None, None)[positions].astype(config.compute_dtype)
  return x


def _check_room(config: ModelConfig, length: int, columns: int) -> None:
  if length > columns:
    raise ShapeError(f'tokens: {length} columns do not fit a cache of {columns}.')
  if config.positions == 'learned' and columns > config.max_length:
    raise ConfigError(
      'model.max_length',
      config.max_length,
      f'at least {columns}, the length of the sequences',
      'Learned positions do not go beyond their table: raise it, or shorten the sequences.',
    )


def _rotation(config: ModelConfig, positions: Array, *, local: bool) -> rotary.Rotation | None:
  return rotary.rotation(config, positions, local=local) if config.positions == 'rotary' else None


def _context(
  config: ModelConfig, columns: Array, positions: Array, segments: Array | None = None
) -> blocks.ByKind:
  """What layers of each kind see: real tokens at or before the position, in the window if local.

  Args:
    config: the architecture.
    columns: `[B, S]` int32, the positions of the real tokens that keys are of, -1 elsewhere.
    positions: `[B, T]` int32, of the queries.
    segments: `[B, S]` int32, the number of each real token's text, where S = T; None: there is one.
  """
  real = columns >= 0
  visible = real[:, None] & (columns[:, None] <= positions[:, :, None])
  if segments is not None:
    visible = visible & (segments[:, :, None] == segments[:, None])
    real = jnp.where(real, segments, 0)
  context = {}
  for local in set(config.is_local()):
    mask = visible
    if local and config.window is not None:
      mask = visible & (positions[:, :, None] - columns[:, None] < config.window)
    context[local] = blocks.Context(mask, real, _rotation(config, positions, local=local))
  return context
