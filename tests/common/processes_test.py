"""What processes do together, as far as one process can show; two are in tests/experiments."""

import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common import processes, trees
from rlhf_jax.common.errors import RunError


def test_a_process_alone_is_the_main_one_and_agrees_with_itself(
  capsys: pytest.CaptureFixture[str],
) -> None:
  assert processes.is_main() and not processes.several()
  processes.say('once')
  assert capsys.readouterr().out == 'once\n'
  processes.barrier('nobody else')
  assert processes.on_main(lambda: 3) == 3
  processes.check_same('anything', 'a')


def test_another_value_than_that_of_process_0_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(processes, 'on_main', lambda function: 'theirs')
  with pytest.raises(RunError, match=r'config of process 0 differ.*\(mine and theirs\)'):
    processes.check_same('config', 'mine')


@pytest.mark.parametrize('count', [0, 1, 7, 8])
def test_rows_are_shared_without_gaps_and_gathered_in_order(
  monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
  """Three processes, of which some may have nothing to do."""
  monkeypatch.setattr(jax, 'process_count', lambda: 3)
  shares = []
  for index in range(3):
    monkeypatch.setattr(jax, 'process_index', lambda index=index: index)
    shares.append(processes.shared_rows(count))
  assert np.concatenate(shares).tolist() == list(range(count))
  monkeypatch.setattr(processes, 'several', lambda: True)
  gathered: list[np.ndarray] = []

  def allgather(own: np.ndarray) -> np.ndarray:
    gathered.append(own)
    return np.stack(gathered)

  monkeypatch.setattr(processes.multihost_utils, 'process_allgather', allgather)
  for share in shares[:-1]:  # what the others give
    with pytest.raises(ValueError):
      processes.gather_rows(10.0 * share, count)
  found = processes.gather_rows(10.0 * shares[-1], count)
  np.testing.assert_array_equal(found, 10.0 * np.arange(count))


def test_arrays_come_to_the_host_as_they_are() -> None:
  array = jnp.arange(6.0).reshape(2, 3)
  tree = {'a': array, 'b': np.int32(3)}
  host = processes.to_host(tree)
  assert isinstance(host['a'], np.ndarray) and host['b'] == 3
  np.testing.assert_array_equal(host['a'], array)
  assert [part.tolist() for part in processes.host_parts(array)] == [array.tolist()]


def digest_of(name: str, array: np.ndarray) -> str:
  """The fingerprint of one array, from all of it at once."""
  head = f'{name}:{array.dtype.name}:{array.shape}\n'.encode()
  return hashlib.sha256(head + array.tobytes()).hexdigest()


@pytest.mark.parametrize('scattered', [False, True])
@pytest.mark.parametrize(
  ('shape', 'numbers', 'sizes'),
  [
    ((5, 16), 200, [80]),
    ((5, 16), 32, [32, 32, 16]),
    ((2, 3, 8), 16, [16, 8, 16, 8]),
    ((2, 2, 8), 5, [5, 3] * 4),
    ((0, 8), 5, None),
  ],
  ids=['whole', 'rows', 'rows of a row', 'parts of a row of a row', 'empty'],
)
def test_parts_are_bounded_and_the_fingerprint_is_that_of_the_whole(
  shape: tuple[int, ...],
  numbers: int,
  sizes: list[int] | None,
  scattered: bool,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """On one device and on eight, whether they are of one process or not."""
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec(*(None,) * (len(shape) - 1), 'data')
  whole = np.arange(math.prod(shape)).reshape(shape).astype(jnp.bfloat16)
  monkeypatch.setattr(processes, '_PART_BYTES', numbers * whole.itemsize)
  monkeypatch.setattr(processes, '_scattered', lambda leaf: scattered)
  for where in (jax.devices()[0], jax.sharding.NamedSharding(mesh, spec)):
    array = jax.device_put(whole, where)
    parts = list(processes.host_parts(array))
    assert sizes is None or [part.size for part in parts] == sizes
    assert b''.join(part.tobytes() for part in parts) == whole.tobytes()
    assert trees.sha256({'w': array}) == digest_of('w', whole)
