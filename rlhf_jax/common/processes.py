"""One run in several processes: who writes, what all of them must agree on, arrays that span them.

Every process runs the same program (`jax.distributed`) and calls the functions here in the same
order. With a single process they do what their names say, at once.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.common.errors import RunError, UserError

T = TypeVar('T')

# Waiting ends because somebody comes, or because the program is ended with all its processes.
_FOREVER_MS = 2**31 - 1
# Bytes of a part that `host_parts` gathers at a time.
_PART_BYTES = 2**28

_order = itertools.count()


def several() -> bool:
  """Whether this is one process of several."""
  # The first question spares a process alone, which may not use jax, the search for devices.
  return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
  """Whether this is process 0, which alone prints, and writes what is not sharded."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def say(text: str) -> None:
  """Prints a line for the user, once."""
  if is_main():
    print(text, flush=True)


def client() -> Any:
  """The client of the coordination service; raises RuntimeError without `jax.distributed`."""
  from jax._src import distributed  # nothing public gives it

  found = distributed.global_state.client
  if found is None:
    raise RuntimeError('There are several processes, but jax.distributed is not initialised.')
  return found


def barrier(name: str) -> None:
  """Waits until every process is here."""
  if several():
    client().wait_at_barrier(f'rlhf_jax/{next(_order)}/{name}', _FOREVER_MS)


def on_main(function: Callable[[], T]) -> T:
  """Runs `function` on process 0 and gives its answer, a JSON value, to all; they wait for it.

  Raises the UserError that it raises there, everywhere.
  """
  if not several():
    return function()
  key = f'rlhf_jax/{next(_order)}/answer'
  if not is_main():
    told = json.loads(client().blocking_key_value_get(key, _FOREVER_MS))
    if 'error' in told:
      raise UserError(told['error'])
    return told['answer']
  try:
    answer = function()
  except UserError as error:
    client().key_value_set(key, json.dumps({'error': str(error)}))
    raise
  client().key_value_set(key, json.dumps({'answer': answer}))
  return answer


def gather(value: Any) -> list[Any]:
  """The JSON values of all processes, in their order, in every process."""
  if not several():
    return [value]
  key = f'rlhf_jax/{next(_order)}/all'
  client().key_value_set(f'{key}/{jax.process_index()}', json.dumps(value))
  return [
    json.loads(client().blocking_key_value_get(f'{key}/{process}', _FOREVER_MS))
    for process in range(jax.process_count())
  ]


def check_same(what: str, value: str) -> None:
  """Raises RunError in a process whose value is not that of process 0; no other one goes on."""
  expected = on_main(lambda: value)
  if value != expected:
    raise RunError(
      f'{what} of process {jax.process_index()} differ from those of process 0 ({value} and '
      f'{expected}). Give all {jax.process_count()} processes the same command, code and files, '
      'and a run directory on a file system that they share.'
    )
  barrier('same')


def to_host(tree: Any) -> Any:
  """Device arrays as numpy arrays, whole on every process; all must ask, if any spans several."""
  return fetch(tree)()


def fetch(tree: Any) -> Callable[[], Any]:
  """Has device arrays set out for the host, before work that devices are given later.

  Returns what waits for them, and gives what `to_host` does.
  """

  def start(leaf: Any) -> Any:
    if _scattered(leaf):
      leaf = jax.device_put(leaf, NamedSharding(leaf.sharding.mesh, PartitionSpec()))
    if isinstance(leaf, jax.Array):
      leaf.copy_to_host_async()
    return leaf

  started = jax.tree.map(start, tree)
  return lambda: jax.device_get(started)


def host_parts(array: Any) -> Iterator[np.ndarray]:
  """An array on the host from its first number to its last, in parts of at most 256 MiB.

  A large array would be whole on the host and, where it spans processes, on every device while it
  is gathered. Parts are some of its rows or, where one row is too large, some of the row's own.
  """
  if not isinstance(array, jax.Array) or array.ndim == 0:
    yield np.asarray(array)
    return
  rows = array.shape[0]
  row_bytes = max(array.nbytes // max(rows, 1), 1)
  if row_bytes > _PART_BYTES and array.ndim > 1:
    for number in range(rows):
      yield from host_parts(_row(array, number))
    return
  size = max(min(rows, _PART_BYTES // row_bytes), 1)
  if size >= rows and not _scattered(array):
    # Another array of the same buffers: jax keeps the copy on the host as long as its array.
    shards = [shard.data for shard in array.addressable_shards]
    yield np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards))
    return
  everywhere = None
  if isinstance(array.sharding, NamedSharding):
    everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())

  def part(array: jax.Array, start: int, rows: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, start, rows)

  cut = jax.jit(part, static_argnums=2, out_shardings=everywhere)
  for start in range(0, rows, size):
    yield np.asarray(cut(array, start, min(size, rows - start)))


@jax.jit
def _row(array: jax.Array, number: int) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(array, number, keepdims=False)


def shared_rows(count: int) -> np.ndarray:
  """The numbers of the rows, of `count`, that this process works on where each needs doing once."""
  return np.array_split(np.arange(count), jax.process_count())[jax.process_index()]


def gather_rows(own: np.ndarray, count: int) -> np.ndarray:
  """All `count` rows, from the `shared_rows` of each process."""
  if not several():
    return own
  longest = -(-count // jax.process_count())
  padded = np.zeros((longest, *own.shape[1:]), own.dtype)
  padded[: len(own)] = own
  found = multihost_utils.process_allgather(padded)
  parts = np.array_split(np.arange(count), jax.process_count())
  return np.concatenate([rows[: len(part)] for rows, part in zip(found, parts, strict=True)])


def _scattered(leaf: Any) -> bool:
  """Whether a part of an array is on no device of this process."""
  return isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
