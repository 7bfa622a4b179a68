"""Which token comes next: a row's draw from its logits."""

import jax
import jax.numpy as jnp

from rlhf_jax.generation.config import GenerationConfig
from rlhf_jax.ops.logprobs import token_logprobs

Array = jax.Array

# Columns whose probabilities are added up together before single ones are looked at.
_BLOCK = 128


def sample_tokens(logits: Array, keys: Array, config: GenerationConfig) -> tuple[Array, Array]:
  """Draws a token a row.

  Args:
    logits: `[B, V]` float32, as the model gives them.
    keys: `[B]` PRNG keys.
    config: temperature and filters; the temperature comes first, then top-k, then top-p.

  Returns:
    `[B]` int32 tokens, and `[B]` float32 their log-probs before filtering, at the temperature (at 1
    where that is 0).
  """
  if config.temperature == 0:
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  else:
    logits = logits / config.temperature
    tokens = draw(filter_logits(logits, config), jax.vmap(jax.random.uniform)(keys))
  return tokens, token_logprobs(logits, tokens)


def draw(logits: Array, uniform: Array) -> Array:
  """Inverts the cumulative distribution of softmax(logits): a random number a row, not one a token.

  A row's token is the first at which the probabilities so far exceed its number; what has no
  probability is never drawn. Each probability is met to the spacing of the numbers, 2 ** -23.

  Args:
    logits: `[B, V]` float32, -inf where a token is forbidden; at least one is not.
    uniform: `[B]` float32 in [0, 1).

  Returns:
    `[B]` int32 tokens.
  """
  rows, size = logits.shape
  mass = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
  shards = _shards(size)
  # Blocks of one shard each: others would have to be put together from two devices.
  width = size // shards
  mass = jnp.pad(mass.reshape(rows, shards, width), ((0, 0), (0, 0), (0, -width % _BLOCK)))
  of_shard = mass.shape[-1] // _BLOCK
  mass = mass.reshape(rows, shards * of_shard, _BLOCK)
  of_blocks = mass.sum(-1)
  block, beyond = _first_above(of_blocks, uniform * of_blocks.sum(-1))
  inside = jnp.take_along_axis(mass, block[:, None, None], axis=1)[:, 0]
  first = block // of_shard * width + block % of_shard * _BLOCK
  return first + _first_above(inside, beyond)[0]


def _shards(size: int) -> int:
  """Over how many devices the mesh cuts so many logits of a row."""
  tensor = jax.sharding.get_abstract_mesh().shape.get('tensor', 1)
  return tensor if size % tensor == 0 else 1


def _first_above(mass: Array, target: Array) -> tuple[Array, Array]:
  """`[B]` int32: the first column of `[B, N]` at which the running total exceeds the `[B]` target.

  And `[B]` float32, how far the target is above the total before it. It is a column with mass, also
  where rounding lets totals fall, or lifts the target to the last one.
  """
  totals = jnp.cumsum(mass, axis=-1)
  held = mass > 0
  highest = jnp.where(held, totals, 0.0).max(axis=-1)
  target = jnp.minimum(target, jnp.nextafter(highest, 0.0))
  column = jnp.argmax(held & (totals > target[:, None]), axis=-1).astype(jnp.int32)
  before = jnp.take_along_axis(totals - mass, column[:, None], axis=-1)[:, 0]
  return column, jnp.maximum(target - before, 0.0)


def filter_logits(logits: Array, config: GenerationConfig) -> Array:
  """Puts -inf where `top_k` and then `top_p` forbid; what ties with the last token kept is kept."""
  if 0 < config.top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, config.top_k)[0][..., -1:]
    logits = jnp.where(logits >= least, logits, -jnp.inf)
  if config.top_p < 1.0:
    descending = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(descending, axis=-1)
    # A token is needed as long as the likelier ones do not hold enough; the first always is.
    needed = jnp.cumsum(probs, axis=-1) - probs < config.top_p
    least = jnp.where(needed, descending, jnp.inf).min(-1, keepdims=True)
    logits = jnp.where(logits >= least, logits, -jnp.inf)
  return logits
