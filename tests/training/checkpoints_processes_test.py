"""Checkpoints of several processes: damage that only one of them meets is damage to all."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.training.checkpoints import CheckpointConfig, Checkpoints
from rlhf_jax.training.state import TrainState
from tests.experiments.programs import ROOT

pytestmark = pytest.mark.slow


def make_state(step: int) -> TrainState:
  """A matrix over both processes, and numbers that both have; they follow from the step."""
  params = {'policy': {'kernel': np.arange(16.0).reshape(8, 2) + step, 'bias': np.full(2, step)}}
  state = TrainState.create(params, optax.sgd(0.1), 7, {})
  state = dataclasses.replace(state, step=np.int32(step))
  mesh = jax.make_mesh((2,), ('fsdp',))

  def place(leaf: Any) -> jax.Array:
    array = np.asarray(leaf, np.float32) if np.asarray(leaf).dtype.kind == 'f' else np.asarray(leaf)
    sharding = NamedSharding(mesh, PartitionSpec('fsdp') if array.ndim == 2 else PartitionSpec())
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

  return jax.tree.map(place, state)


def altered(loaded: dict[str, Any]) -> dict[str, Any]:
  """As if this process had read other numbers than the other one."""
  policy = loaded['params_policy']
  other = np.full(policy['bias'].shape, 9, policy['bias'].dtype)
  bias = jax.make_array_from_callback(other.shape, policy['bias'].sharding, lambda i: other[i])
  return {**loaded, 'params_policy': {**policy, 'bias': bias}}


def work(port: str, number: str, folder: str) -> None:
  """One of the two processes: writes steps, meets damage if it is the second, says what it has."""
  jax.distributed.initialize(
    f'localhost:{port}', 2, int(number), cluster_detection_method='deactivate'
  )

  def opened() -> Checkpoints:
    return Checkpoints(pathlib.Path(folder) / 'checkpoints', CheckpointConfig(keep=3))

  found = []
  for steps in ((2, 3), (4,)):
    checkpoints = opened()
    for step in steps:
      checkpoints.save(step, make_state(step), {})
    checkpoints.close()
    checkpoints = opened()
    load = checkpoints._checkpointer.load_checkpointables

    def damaged(step: int, abstract: Any, load: Any = load) -> Any:
      if number == '0' or step == 2:
        return load(step, abstract)
      if step == 3:
        raise ValueError('DATA_LOSS: made up for this test')
      return altered(load(step, abstract))

    checkpoints._checkpointer.load_checkpointables = damaged
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(0)
    )
    state, _ = checkpoints.restore(abstract)
    own = state.params['policy']['kernel'].addressable_shards[0].data
    found.append([int(state.step), float(jnp.sum(own))])
    checkpoints.close()
  print(json.dumps(found))


def test_damage_that_one_process_meets_sets_all_back(tmp_path: pathlib.Path) -> None:
  """It raises there, or has read other numbers: none waits for the other, and both go back."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  command = [sys.executable, __file__, str(port)]
  programs = [
    subprocess.Popen(
      [*command, str(number), str(tmp_path)],
      cwd=ROOT,
      env={**os.environ, 'JAX_NUM_CPU_DEVICES': '1', 'PYTHONPATH': str(ROOT)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(2)
  ]
  try:
    said = [program.communicate(timeout=120) for program in programs]
  finally:
    for program in programs:
      program.kill()
  assert [program.returncode for program in programs] == [0, 0], said
  kernel = np.arange(16.0).reshape(8, 2) + 2
  for number, (out, _) in enumerate(said):
    own = kernel[4 * number : 4 * number + 4].sum()
    assert json.loads(out.splitlines()[-1]) == [[2, own], [2, own]]
  text = said[0][0]
  assert 'DATA_LOSS: made up' in text and "params_policy: 'bias' differ from what was" in text
  assert text.count('falling back to step 2') == 2
  assert sorted(path.name for path in (tmp_path / 'damaged').iterdir()) == ['3.0', '4.0']


if __name__ == '__main__':
  work(*sys.argv[1:])
