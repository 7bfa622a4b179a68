"""Scores of given tokens without the `[B, R, V]` logits: the vocabulary is read in chunks.

The log-sum-exp is carried from chunk to chunk with its largest term so far (Milakov & Gimelshein
2018, "Online normalizer calculation for softmax"), and the backward pass computes each chunk's
logits again (Wijmans et al. 2024, "Cut your losses in large-vocabulary language models"). A table
that is cut over the mesh's tensor axis is read by every device in its own part; parts meet once, in
`[B, R]` sums.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.sharding.mesh import BATCH_AXES, constrain

Array = jax.Array

_LOWEST = float(jnp.finfo(jnp.float32).min)


class Readout(NamedTuple):
  """How hidden states become logits; hashable, the same for every chunk.

  Attributes:
    vocab_size: ids; further rows of the table are never scored.
    chunk: how many ids each device reads at a time.
    vocab_axis: 0 for a table `[V, D]`, 1 for `[D, V]`.
    temperature: what logits are divided by.
    softcap: if given, logits are softcap * tanh(logits / softcap), before the temperature.
  """

  vocab_size: int
  chunk: int
  vocab_axis: int
  temperature: float = 1.0
  softcap: float | None = None


class TokenScores(NamedTuple):
  """What is known of the distribution at each position; float32, `[B, R]`.

  Attributes:
    chosen: the given token's logit.
    normalizer: log-sum-exp of all logits.
    entropy: in nats.
  """

  chosen: Array
  normalizer: Array
  entropy: Array

  @property
  def logprobs(self) -> Array:
    """Log-probs of the given tokens."""
    return self.chosen - self.normalizer


class _Running(NamedTuple):
  """Sums over the ids read so far, each `[S, B, R]` for `S` parts of the vocabulary.

  With `m` the largest logit l so far: `total` = sum exp(l - m), `moment` = sum exp(l - m) (l - m).
  """

  largest: Array
  total: Array
  moment: Array
  chosen: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_scores(
  readout: Readout, hidden: Array, table: Array, bias: Array | None, tokens: Array
) -> TokenScores:
  """Logits, normalizers and entropies of given tokens, a chunk of the vocabulary at a time.

  Products are computed in the type of `hidden` with float32 sums, everything after them in float32.

  Args:
    readout: how logits are made, and the size of a chunk.
    hidden: `[B, R, D]`, any floating type.
    table: `[V, D]` or `[D, V]` with V >= vocab_size, as `readout.vocab_axis` says.
    bias: `[V]`, added to the logits; None: there is none.
    tokens: `[B, R]` int32, below vocab_size.
  """
  return _forward(readout, hidden, table, bias, tokens)


def _forward(
  readout: Readout, hidden: Array, table: Array, bias: Array | None, tokens: Array
) -> TokenScores:
  chunks = _Chunks(readout, table, bias)

  def step(running: _Running, number: Array) -> tuple[_Running, None]:
    logits, seen, ids = chunks.logits(hidden, number)
    return _extend(running, logits, seen, tokens[..., None] == ids), None

  running, _ = jax.lax.scan(step, _nothing(chunks.parts, tokens), jnp.arange(chunks.count))
  return _close(running)


def _forward_rule(
  readout: Readout, hidden: Array, table: Array, bias: Array | None, tokens: Array
) -> tuple[TokenScores, Any]:
  scores = _forward(readout, hidden, table, bias, tokens)
  return scores, (hidden, table, bias, tokens, scores.normalizer, scores.entropy)


def _backward_rule(readout: Readout, residuals: Any, gradient: TokenScores) -> tuple[Any, ...]:
  hidden, table, bias, tokens, normalizer, entropies = residuals
  chunks = _Chunks(readout, table, bias)
  by_chosen, by_normalizer, by_entropy = (g[..., None] for g in gradient)

  def step(carry: tuple[Array, Array, Array | None], number: Array) -> tuple[Any, None]:
    by_hidden, by_table, by_bias = carry
    logits, seen, ids = chunks.logits(hidden, number)
    logprobs = logits - normalizer[..., None]
    probs = jnp.where(seen, jnp.exp(logprobs), 0.0)
    chosen = jnp.where(seen & (tokens[..., None] == ids), by_chosen, 0.0)
    by_logits = chosen + probs * (by_normalizer - by_entropy * (logprobs + entropies[..., None]))
    by_product = by_logits / readout.temperature
    if readout.softcap is not None:
      by_product = by_product * (1 - jnp.square(logits * (readout.temperature / readout.softcap)))
    narrow = by_product.astype(hidden.dtype)
    by_hidden = by_hidden + chunks.to_hidden(narrow, number)
    by_table = chunks.add(by_table, chunks.to_table(narrow, hidden), number)
    if by_bias is not None:
      by_bias = chunks.add(by_bias, by_product.sum((1, 2)), number)
    return (by_hidden, by_table, by_bias), None

  start = (
    constrain(jnp.zeros((chunks.parts, *hidden.shape), jnp.float32), 'tensor', BATCH_AXES),
    chunks.lay(jnp.zeros(chunks.table.shape, jnp.float32)),
    None if bias is None else jnp.zeros((chunks.parts, chunks.width), jnp.float32),
  )
  (by_hidden, by_table, by_bias), _ = jax.lax.scan(step, start, jnp.arange(chunks.count))
  return (
    by_hidden.sum(0).astype(hidden.dtype),
    by_table.reshape(table.shape).astype(table.dtype),
    None if by_bias is None or bias is None else by_bias.reshape(bias.shape).astype(bias.dtype),
    None,
  )


token_scores.defvjp(_forward_rule, _backward_rule)


def exact_kl(
  readout: Readout,
  policy: tuple[Array, Array],
  reference: tuple[Array, Array],
) -> Array:
  """KL(policy || reference) at each position, `[B, R]` float32; its gradient is not economical.

  Args:
    readout: how both make logits.
    policy: hidden states `[B, R, D]` and table.
    reference: its hidden states and table.
  """
  chunks, other = (_Chunks(readout, table, None) for _, table in (policy, reference))

  def step(carry: Any, number: Array) -> tuple[Any, None]:
    running, against, difference = carry
    logits, seen, _ = chunks.logits(policy[0], number)
    reference_logits, _, _ = other.logits(reference[0], number)
    new = _extend(running, logits, seen, False)
    kept = jnp.exp(running.largest - new.largest)
    weights = jnp.where(seen, jnp.exp(logits - new.largest[..., None]), 0.0)
    difference = difference * kept + (weights * (logits - reference_logits)).sum(-1)
    return (new, _extend(against, reference_logits, seen, False), difference), None

  nothing = _nothing(chunks.parts, policy[0][..., 0])
  (running, against, difference), _ = jax.lax.scan(
    step, (nothing, nothing, nothing.total), jnp.arange(chunks.count)
  )
  weights = jnp.exp(running.largest - running.largest.max(0))
  mean = (difference * weights).sum(0) / (running.total * weights).sum(0)
  return mean - _close(running).normalizer + _close(against).normalizer


class _Chunks:
  """A table in `parts` of the tensor axis, each read in `count` chunks of `size` ids.

  The last chunk overlaps the one before it where the size does not divide a part; ids of the
  overlap count as unseen the second time.
  """

  def __init__(self, readout: Readout, table: Array, bias: Array | None):
    vocabulary = table.shape[readout.vocab_axis]
    tensor = jax.sharding.get_abstract_mesh().shape.get('tensor', 1)
    self.readout = readout
    self.parts = tensor if vocabulary % tensor == 0 else 1
    self.width = vocabulary // self.parts
    self.count = math.ceil(self.width / readout.chunk)
    self.size = math.ceil(self.width / self.count)
    shape = list(table.shape)
    shape[readout.vocab_axis : readout.vocab_axis + 1] = [self.parts, self.width]
    self.table = self.lay(table.reshape(shape))
    self.bias = None if bias is None else bias.reshape(self.parts, self.width)

  def lay(self, table: Array) -> Array:
    """Lays a parted table, or a part of its ids, as the parameter lies."""
    if self.readout.vocab_axis == 0:
      return constrain(table, 'tensor', None, 'fsdp')
    return constrain(table, 'fsdp', 'tensor')

  def logits(self, hidden: Array, number: Array) -> tuple[Array, Array, Array]:
    """A chunk's logits `[S, B, R, C]`, which of them are new ids, and the ids, that broadcast."""
    readout, start = self.readout, self._start(number)
    equation = 'brd,svd->sbrv' if readout.vocab_axis == 0 else 'brd,dsv->sbrv'
    logits = jnp.einsum(
      equation, hidden, self._read(number, hidden.dtype), preferred_element_type=jnp.float32
    )
    logits = constrain(logits, 'tensor', BATCH_AXES)
    if self.bias is not None:
      bias = jax.lax.dynamic_slice_in_dim(self.bias, start, self.size, axis=1)
      logits = logits + bias[:, None, None]
    if readout.softcap is not None:
      logits = readout.softcap * jnp.tanh(logits / readout.softcap)
    columns = start + jnp.arange(self.size)
    ids = columns + self.width * jnp.arange(self.parts)[:, None, None, None]
    seen = (columns >= number * self.size) & (ids < readout.vocab_size)
    return logits / readout.temperature, seen, ids

  def to_hidden(self, by_product: Array, number: Array) -> Array:
    """Pulls a chunk's gradient `[S, B, R, C]` back to hidden states, `[S, B, R, D]` float32."""
    equation = 'sbrv,svd->sbrd' if self.readout.vocab_axis == 0 else 'sbrv,dsv->sbrd'
    part = self._read(number, by_product.dtype)
    return jnp.einsum(equation, by_product, part, preferred_element_type=jnp.float32)

  def to_table(self, by_product: Array, hidden: Array) -> Array:
    """Pulls a chunk's gradient back to its part of the table, float32."""
    equation = 'brd,sbrv->svd' if self.readout.vocab_axis == 0 else 'brd,sbrv->dsv'
    return self.lay(jnp.einsum(equation, hidden, by_product, preferred_element_type=jnp.float32))

  def add(self, whole: Array, part: Array, number: Array) -> Array:
    """Adds a chunk's part to an array with the ids of each part of the vocabulary."""
    axis = 1 if whole.ndim == 2 or self.readout.vocab_axis == 0 else 2
    start = self._start(number)
    old = jax.lax.dynamic_slice_in_dim(whole, start, self.size, axis)
    return jax.lax.dynamic_update_slice_in_dim(whole, old + part, start, axis)

  def _start(self, number: Array) -> Array:
    return jnp.minimum(number * self.size, self.width - self.size)

  def _read(self, number: Array, dtype: Any) -> Array:
    """A chunk of the table, whole along the width."""
    axis = 1 if self.readout.vocab_axis == 0 else 2
    part = jax.lax.dynamic_slice_in_dim(self.table, self._start(number), self.size, axis)
    axes = ('tensor',) if self.readout.vocab_axis == 0 else (None, 'tensor')
    return constrain(part.astype(dtype), *axes)


def _nothing(parts: int, like: Array) -> _Running:
  zeros = constrain(jnp.zeros((parts, *like.shape), jnp.float32), 'tensor', BATCH_AXES)
  return _Running(zeros + _LOWEST, zeros, zeros, zeros)


def _extend(running: _Running, logits: Array, seen: Array, chosen: Array | bool) -> _Running:
  """Takes a chunk's logits `[S, B, R, C]` into the sums."""
  largest = jnp.maximum(running.largest, jnp.where(seen, logits, _LOWEST).max(-1))
  # The lowest float rather than -inf, so that the difference of two of them is 0 and not nan.
  fall = running.largest - largest
  kept = jnp.exp(fall)
  shifted = logits - largest[..., None]
  terms = jnp.where(seen, jnp.exp(shifted), 0.0)
  return _Running(
    largest,
    kept * running.total + terms.sum(-1),
    kept * (running.moment + jnp.where(kept > 0, fall, 0.0) * running.total)
    + jnp.where(seen, terms * shifted, 0.0).sum(-1),
    running.chosen + jnp.where(seen & chosen, logits, 0.0).sum(-1),
  )


def _close(running: _Running) -> TokenScores:
  """Joins the parts of the vocabulary."""
  largest = running.largest.max(0)
  fall = running.largest - largest
  weights = jnp.exp(fall)
  total = (weights * running.total).sum(0)
  moment = (weights * (running.moment + jnp.where(weights > 0, fall, 0.0) * running.total)).sum(0)
  normalizer = largest + jnp.log(total)
  return TokenScores(running.chosen.sum(0), normalizer, jnp.log(total) - moment / total)
