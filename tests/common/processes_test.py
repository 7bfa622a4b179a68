"""What processes do together, as far as one process can show; two are in tests/experiments."""

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


def test_an_array_gathered_in_parts_has_the_same_fingerprint(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """As where it spans processes: a few rows at a time, the last part shorter."""
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'data'))
  array = jax.device_put(np.arange(5 * 16, dtype=np.float32).reshape(5, 16), sharding)
  expected = trees.sha256({'w': array})
  monkeypatch.setattr(processes, '_scattered', lambda leaf: True)
  monkeypatch.setattr(processes, '_PART_BYTES', 2 * 16 * 4)
  assert [len(part) for part in processes.host_parts(array)] == [2, 2, 1]
  assert trees.sha256({'w': array}) == expected
