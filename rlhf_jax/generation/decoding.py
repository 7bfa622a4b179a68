"""The decode loop: slots that each work on a row, and take a waiting one when theirs has ended.

All slots write to the same column of the cache at a time. The columns go round: a row that starts
late has its prompt in those just before the next one, so that a slot never needs more of them than
one row does, and no step writes to more than one column.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.common import prng
from rlhf_jax.common.checks import check_shapes
from rlhf_jax.common.types import Prompts
from rlhf_jax.generation.config import GenerationConfig
from rlhf_jax.generation.drawing import sample_tokens
from rlhf_jax.generation.samples import Samples, repeat_prompts
from rlhf_jax.models import decoder
from rlhf_jax.models.cache import Cache, init_cache
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.sharding.mesh import BATCH_AXES, constrain_batch

Array = jax.Array

# Waiting rows are let in when this part of the slots is free: it costs about a step to do so.
_FREE = 1 / 8


class Machine(NamedTuple):
  """What a loop runs.

  Attributes:
    model: the policy's architecture.
    params: its decoder's, as `decoder.decoding_params` makes them.
    readout: from final hidden states `[S, width]` to the next token's logits `[S, V]`.
    config: how tokens are drawn.
    stops: tokens that end a row.
    pad_id: fills what is not sampled.
    longest: R, tokens of the longest response.
  """

  model: ModelConfig
  params: Any
  readout: Callable[[Array], Array]
  config: GenerationConfig
  stops: tuple[int, ...]
  pad_id: int
  longest: int


@struct.dataclass
class _Slots:
  """What each of `S` slots is at.

  Attributes:
    row: `[S]` int32, the number of the row that it works on, the number of rows if none.
    keys: `[S]` PRNG keys of those rows.
    step: `[S]` int32, how many tokens are sampled.
    last: `[S]` int32, the token that is not yet read.
    samples: `[S, R]`.
    cache: `[S]` rows.
  """

  row: Array
  keys: Array
  step: Array
  last: Array
  samples: Samples
  cache: Cache


class _Queue(NamedTuple):
  """Rows in the order in which they are sampled, and what is known of their prompts.

  Rows, slots and prompts are in groups, one a part of the mesh that holds rows, and a slot takes
  rows of its group: nothing of a cache changes devices.

  Attributes:
    rows: how many.
    copies: adjacent rows that have one prompt.
    groups: how many.
    keys: `[rows]`.
    last: `[B]` int32, the last token of each prompt.
    cache: of the prompts `[B]`, their last tokens left out.
  """

  rows: int
  copies: int
  groups: int
  keys: Array
  last: Array
  cache: Cache


def run(machine: Machine, prompts: Prompts, key: Array, copies: int, slots: int) -> Samples:
  """Samples so many responses to each prompt.

  Args:
    machine: what is run.
    prompts: `[B, P]`.
    key: of this round of sampling.
    copies: adjacent rows that answer one prompt.
    slots: how many rows are sampled at a time, at most B * copies.

  Returns:
    `[B * copies, R]` responses.
  """
  rows = len(prompts.tokens) * copies
  keys = prng.row_keys(key, repeat_prompts(prompts, copies).index)
  last = prompts.tokens[:, -1]
  # The last token sampled is never read, so the cache needs no column for it.
  columns = prompts.tokens.shape[1] + machine.longest - 1
  if rows == slots and copies == 1:
    numbers = jnp.arange(rows)
    cache = _prefill(machine, prompts, columns)
    state = _Slots(numbers, keys, jnp.zeros_like(last), last, _nothing(machine, rows), cache)
    return _decode(machine, state).samples
  cache = _prefill(machine, prompts, prompts.tokens.shape[1] - 1)
  queue = _Queue(rows, copies, _groups(len(last), slots), keys, last, cache)
  state = _Slots(
    jnp.full(slots, rows),
    keys[:slots],
    jnp.full(slots, machine.longest),
    jnp.zeros(slots, last.dtype),
    _nothing(machine, slots),
    dataclasses.replace(init_cache(machine.model, slots, columns), index=cache.index),
  )
  following = jnp.zeros(queue.groups, jnp.int32)
  if rows == slots:
    state, _ = _let_in(machine, queue, state, following)
    return _decode(machine, state).samples
  return _work_off(machine, queue, state, following)


def _prefill(machine: Machine, prompts: Prompts, columns: int) -> Cache:
  """A cache of that many columns that holds the prompts, their last tokens left out.

  Those are left to the loop, which then has the only copy of a step: half as much to compile.
  """
  rows, length = prompts.tokens.shape
  cache = init_cache(machine.model, rows, columns)
  if length > 1:
    start = (prompts.tokens[:, :-1], prompts.mask[:, :-1])
    _, cache = decoder.hidden_states(machine.model, machine.params, *start, cache=cache)
  return cache


def _nothing(machine: Machine, rows: int) -> Samples:
  """Responses before their first token."""
  shape = (rows, machine.longest)
  return Samples(
    tokens=jnp.full(shape, machine.pad_id, jnp.int32),
    mask=jnp.zeros(shape, bool),
    logprobs=jnp.zeros(shape, jnp.float32),
    finished=jnp.zeros(rows, bool),
  )


def _running(machine: Machine, state: _Slots) -> Array:
  """`[S]` bool, slots whose row goes on."""
  return (state.step < machine.longest) & ~state.samples.finished


def _decode(machine: Machine, state: _Slots, waiting: Array | None = None) -> _Slots:
  """Steps until every row has ended, or enough slots are free for rows that wait.

  Args:
    machine: what is run.
    state: the slots.
    waiting: `[G]` bool, groups whose rows are not all let in; None: all are.
  """

  def goes_on(state: _Slots) -> Array:
    running = _running(machine, state)
    if waiting is None:
      return running.any()
    free = (~running.reshape(len(waiting), -1) & waiting[:, None]).sum()
    return running.any() & (free < max(1, round(_FREE * len(running))))

  return jax.lax.while_loop(goes_on, functools.partial(_step, machine), state)


def _step(machine: Machine, state: _Slots) -> _Slots:
  """Reads the last token of each slot and samples the next."""
  running = _running(machine, state)
  hidden, cache = decoder.hidden_states(
    machine.model, machine.params, state.last[:, None], running[:, None], cache=state.cache
  )
  cache = dataclasses.replace(cache, index=cache.index % cache.length)
  logits = machine.readout(hidden[:, 0])
  check_shapes('hidden:B1D logits:BV', hidden=hidden, logits=logits)
  keys = jax.vmap(jax.random.fold_in)(state.keys, state.step)
  drawn, logprobs = sample_tokens(logits, keys, machine.config)
  stopped = functools.reduce(
    jnp.logical_or, (drawn == stop for stop in machine.stops), jnp.zeros_like(running)
  )
  here = running[:, None] & (jnp.arange(machine.longest) == state.step[:, None])
  old = state.samples
  samples = Samples(
    tokens=jnp.where(here, drawn[:, None], old.tokens),
    mask=old.mask | here,
    logprobs=jnp.where(here, logprobs[:, None], old.logprobs),
    finished=old.finished | (running & stopped),
  )
  return _Slots(state.row, state.keys, state.step + running, drawn, samples, cache)


def _work_off(machine: Machine, queue: _Queue, state: _Slots, following: Array) -> Samples:
  """Lets rows in and samples until none is left."""
  each = queue.rows // queue.groups

  def keep(state: _Slots, kept: Samples) -> Samples:
    # A slot without a row has a number that is out of bounds, and is dropped.
    row = jnp.where(_running(machine, state), queue.rows, state.row)
    return jax.tree.map(lambda new, all_: all_.at[row].set(new, mode='drop'), state.samples, kept)

  def goes_on(carry: Any) -> Array:
    state, following, _ = carry
    return (following < each).any() | _running(machine, state).any()

  def go_on(carry: Any) -> Any:
    state, following, kept = carry
    kept = keep(state, kept)
    state, following = _let_in(machine, queue, state, following)
    return _decode(machine, state, following < each), following, kept

  start = (state, following, _nothing(machine, queue.rows))
  state, _, kept = jax.lax.while_loop(goes_on, go_on, start)
  return keep(state, kept)


def _let_in(
  machine: Machine, queue: _Queue, state: _Slots, following: Array
) -> tuple[_Slots, Array]:
  """Gives each free slot the next row of its group, as long as there are any.

  `following` `[G]` int32 is the next row of each group, counted within it.
  """
  each = queue.rows // queue.groups
  free = ~_running(machine, state).reshape(queue.groups, -1)
  number = following[:, None] + jnp.cumsum(free, axis=1) - free
  taken = free & (number < each)
  following = jnp.minimum(following + free.sum(1), each)
  row = jnp.where(taken, number + each * jnp.arange(queue.groups)[:, None], queue.rows).reshape(-1)
  fresh, free = taken.reshape(-1), free.reshape(-1)
  prompt = jnp.where(taken, number // queue.copies, 0)

  def of_prompt(array: Array) -> Array:
    """`[B, ...]` of prompts -> `[S, ...]` of slots, where they are fresh."""
    # No -1: an axis may have no entries, where prompts have one token.
    rows, *rest = array.shape
    grouped = array.reshape(queue.groups, rows // queue.groups, *rest)
    got = jax.vmap(lambda part, chosen: part[chosen])(grouped, prompt)
    return constrain_batch(got.reshape(prompt.size, *rest))

  def renew(new: Array, old: Array) -> Array:
    return jnp.where(fresh.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

  def place(array: Array, old: Array, axis: int, empty: float = 0) -> Array:
    """Puts columns of prompts just before the next one."""
    new = of_prompt(array)
    room = [(0, 0)] * new.ndim
    room[axis] = (0, old.shape[axis] - new.shape[axis])
    shift = state.cache.index - new.shape[axis]
    new = jnp.roll(jnp.pad(new, room, constant_values=empty), shift, axis)
    return renew(new, old)

  def place_layers(array: Any, old: Any) -> Any:
    columns = functools.partial(place, axis=2)
    if machine.model.scanned:
      return jax.vmap(columns)(array, old)
    return tuple(columns(*both) for both in zip(array, old, strict=True))

  old, new = state.cache, queue.cache
  cache = Cache(
    keys=place_layers(new.keys, old.keys),
    values=place_layers(new.values, old.values),
    column_positions=place(new.column_positions, old.column_positions, axis=1, empty=-1),
    positions=renew(of_prompt(new.positions), old.positions),
    index=old.index,
  )
  nothing = _nothing(machine, len(fresh))
  samples = jax.tree.map(renew, nothing, state.samples)
  return _Slots(
    row=jnp.where(free, row, state.row),
    keys=jnp.where(fresh, queue.keys[jnp.minimum(row, queue.rows - 1)], state.keys),
    step=jnp.where(fresh, 0, jnp.where(free, machine.longest, state.step)),
    last=renew(of_prompt(queue.last), state.last),
    samples=samples,
    cache=cache,
  ), following


def _groups(prompts: int, slots: int) -> int:
  """Parts of the mesh that hold rows; 1 where prompts or slots do not divide over them."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return 1
  parts = mesh.shape[BATCH_AXES[0]] * mesh.shape[BATCH_AXES[1]]
  return 1 if prompts % parts or slots % parts else parts
