"""What every device holds of a stage: nothing large lies there whole that could be cut."""

import dataclasses
import gc
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from rlhf_jax.common import trees
from rlhf_jax.common.types import Prompts
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.generation.config import GenerationConfig
from rlhf_jax.generation.sample import generate
from rlhf_jax.models import decoder
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.objectives.ppo import PPOConfig
from rlhf_jax.recipes import Built, parts
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh, put_batch
from tests import tiny

pytestmark = pytest.mark.slow

MESHES = {
  'fsdp 4, tensor 2': MeshConfig(data=1, fsdp=4, tensor=2),
  'all 2': MeshConfig(data=2, fsdp=2, tensor=2),
}
THOROUGH = 'fsdp 4, tensor 2'
# PPO with a value trunk of its own, and values from the reward model's, beside the plain cases.
VALUE_MODELS = {'ppo separate': 'separate', 'ppo reward_model': 'reward_model'}
CASES = ['sft', 'reward_model', 'dpo', 'dpo lora', 'ilql', *VALUE_MODELS]
# How many decoders are frozen beside: a reference and a reward model.
FROZEN = {'dpo': 1, 'ppo separate': 2, 'ppo reward_model': 2}
# Elements that an array may have and lie whole on every device: biases, counters.
SMALL = 32
# Arrays that small that are whole, together.
SLACK_BYTES = 1024


def make_config(case: str, start: pathlib.Path, mesh: MeshConfig) -> ExperimentConfig:
  config: ExperimentConfig = tiny.make_config(case.split()[0], start, mesh=mesh, steps=1)
  if case in VALUE_MODELS:
    objective = PPOConfig(value_model=VALUE_MODELS[case])
    config = dataclasses.replace(config, objective=objective)
  if case.endswith('lora'):
    config.adapter = AdapterConfig(method='lora', rank=8)
  return config


def parts_of(array: jax.Array) -> int:
  """Over how many devices an array is cut."""
  return array.size // int(np.prod(array.sharding.shard_shape(array.shape)))


def uncut(arrays: dict[str, jax.Array], mesh: Mesh) -> list[str]:
  """The larger arrays that are whole on every device though an axis of the mesh divides a size."""
  axes = [size for size in mesh.shape.values() if size > 1]
  return [
    f'{name} {array.dtype}{list(array.shape)}'
    for name, array in arrays.items()
    if array.size > SMALL
    and parts_of(array) == 1
    and any(size % axis == 0 for size in array.shape for axis in axes)
  ]


def arrays_on(mesh: Mesh) -> list[jax.Array]:
  """Every array that is alive and lies on all devices of the mesh."""
  gc.collect()
  return [x for x in jax.live_arrays() if x.sharding.device_set == set(mesh.devices.flat)]


def bytes_on_a_device(arrays: Any) -> int:
  return sum(array.addressable_shards[0].data.nbytes for array in arrays)


def total_bytes(arrays: list[jax.Array]) -> int:
  return sum(array.nbytes for array in arrays)


def take_step(built: Built) -> dict[str, Any]:
  """The trees that are known by name after a step."""
  recipe = built.recipe
  with jax.set_mesh(built.mesh):
    state = recipe.init()
    prepared = recipe.prepare(state, recipe.batch(0))
    batch, carry = prepared.batch, prepared.carry
    state, _ = recipe.update(dataclasses.replace(state, carry=carry), batch)
  return {
    'params': state.params,
    'opt_state': state.opt_state,
    'targets': state.targets,
    'batch': batch,
  }


@pytest.mark.parametrize(
  ('case', 'mesh_name'), [(case, THOROUGH) for case in CASES] + [('dpo', 'all 2')]
)
def test_nothing_large_is_whole_everywhere(
  case: str, mesh_name: str, parents: pathlib.Path
) -> None:
  """Of all arrays alive after a step: state, batch, and the frozen trees that nothing names.

  A device holds no more bytes than its part of parameters, moments, targets and frozen trees.
  """
  jax.clear_caches()  # constants of other tests' programs live in them
  older = jax.live_arrays()  # held to the end, so that none of their ids is given to a new array
  ids = {id(array) for array in older}
  built = tiny.build_recipe(make_config(case, parents, MESHES[mesh_name]), 8)
  mesh = built.mesh
  named = trees.flatten(take_step(built))
  names = {id(array): name for name, array in named.items()}
  alive = [array for array in arrays_on(mesh) if id(array) not in ids]
  found = {names.get(id(array), f'frozen {number}'): array for number, array in enumerate(alive)}
  assert named.keys() <= found.keys(), 'every array of the state is alive'
  assert not uncut(found, mesh)

  def pick(start: str) -> list[jax.Array]:
    return [array for name, array in found.items() if name.startswith(start)]

  cut = mesh.shape['fsdp'] * mesh.shape['tensor']
  policy = total_bytes(pick('params.policy'))
  assert total_bytes(pick('frozen')) >= FROZEN.get(case, 0) * policy
  for start in ('params', 'opt_state', 'targets', 'frozen'):
    arrays = pick(start)
    assert bytes_on_a_device(arrays) <= 1.1 * total_bytes(arrays) / cut + SLACK_BYTES, start


def test_the_check_names_what_is_whole() -> None:
  """A replicated matrix is found and named; a small one, or one that nothing divides, is not."""
  mesh = make_mesh(MESHES['fsdp 4, tensor 2'])
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  put = lambda *shape: jax.device_put(np.zeros(shape, np.float32), everywhere)  # noqa: E731
  arrays = {'trunk.kernel': put(8, 16), 'bias': put(16), 'odd': put(7, 9)}
  assert uncut(arrays, mesh) == ['trunk.kernel float32[8, 16]']


@pytest.mark.parametrize('mesh_name', MESHES)
@pytest.mark.parametrize('scan_layers', [False, True])
def test_the_cache_of_generation_is_cut_over_rows_and_heads(
  mesh_name: str, scan_layers: bool
) -> None:
  """In the compiled sampler no buffer has the cache's whole rows or heads."""
  mesh = make_mesh(MESHES[mesh_name])
  # Seven columns, which no other array has.
  rows, prompt, response, width, heads = 8, 4, 4, 16, 2
  config = dataclasses.replace(tiny.MODEL, vocab_size=16, layers=2, scan_layers=scan_layers)
  with jax.set_mesh(mesh):
    shardings = parts.shardings_of(parts.abstract_decoder(config, mesh))
    params = jax.jit(lambda key: decoder.init(config, key), out_shardings=shardings)(
      jax.random.key(0)
    )
    prompts = Prompts(
      tokens=np.ones((rows, prompt), np.int32),
      mask=np.ones((rows, prompt), bool),
      index=np.arange(rows, dtype=np.int32),
    )
    sample = jax.jit(
      lambda params, prompts, key: generate(
        config,
        params,
        prompts,
        key,
        config=GenerationConfig(),
        max_new_tokens=response,
        eos_id=1,
        pad_id=0,
      )
    )
    text = sample.lower(params, put_batch(prompts, mesh), jax.random.key(1)).compile().as_text()
  assert text is not None
  columns = prompt + response - 1
  shapes = {
    tuple(map(int, found))
    for found in re.findall(rf'f32\[(?:2,)?(\d+),(\d+),{columns},{width // heads}\]', text)
  }
  assert shapes == {(rows // (mesh.shape['data'] * mesh.shape['fsdp']), heads // 2)}
