"""The engine that samples a stage's rollouts, as its config asks."""

import functools
import pathlib
import zlib
from typing import Any

import jax

from rlhf_jax.common import processes
from rlhf_jax.common.errors import ConfigError, RunError
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.hf_folder import assets_of
from rlhf_jax.models import adapters, hf_export
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.objectives import demands_of
from rlhf_jax.recipes.parts import Parts
from rlhf_jax.recipes.policies import make_sampler, stops_of
from rlhf_jax.rollout.dialects import Wanted
from rlhf_jax.rollout.engine import LocalEngine, Roles, RolloutEngine, bucket_lengths
from rlhf_jax.rollout.http_engine import HttpEngine, Served
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh, share_of

Mesh = jax.sharding.Mesh


def make_engine(parts: Parts, folder: pathlib.Path | None) -> RolloutEngine:
  """What samples the rollouts of a stage.

  Args:
    parts: the stage's pieces.
    folder: the run directory; None: none, and so no server either.

  Raises:
    ConfigError: a server samples for one process alone.
    CheckpointError: no family of Hugging Face's has the decoder, and so no server.
    RunError: a server samples for runs only.
    ServerError: the server cannot be reached.
  """
  config = parts.config
  copies = demands_of(config.objective).samples
  if config.rollout.engine == 'local':
    lengths = bucket_lengths(config.data.prompt_length, config.rollout.prompt_buckets)
    share = share_of(config.batch_size, parts.mesh)
    elsewhere = sampling_mesh(config, parts.model, parts.mesh)
    return LocalEngine(make_sampler(parts, copies), parts.mesh, share, lengths, elsewhere)
  if processes.several():
    raise ConfigError('rollout.engine', 'http', "'local' with several processes")
  if folder is None:
    raise RunError(
      f"{config.name}: its responses are sampled by a server (rollout.engine='http'), which need "
      'not give them again: its steps cannot be made anew.'
    )
  server = config.rollout.server
  wanted = Wanted(
    config.generation.temperature, config.data.response_length, stops_of(parts), server.model
  )
  weights = _weights_folder(server.weights, folder)
  served = _served(parts, folder, weights, copies)
  return HttpEngine(server, wanted, served, weights, parts.mesh)


def sampling_mesh(config: ExperimentConfig, model: ModelConfig, mesh: Mesh) -> Mesh | None:
  """The mesh that a config samples its rollouts on; None: that of training.

  Raises:
    ConfigError: the devices, the heads or the prompts do not divide over it.
  """
  tensor = config.rollout.sampling_tensor
  if not tensor:
    return None
  groups, left = divmod(mesh.size, tensor)
  expected = None
  if left:
    expected = f'a divisor of the number of devices, {mesh.size}'
  elif model.heads % tensor or model.num_kv_heads % tensor:
    expected = f'a divisor of the heads, {model.heads}, and of those of keys, {model.num_kv_heads}'
  elif config.batch_size % groups:
    expected = f'as many that their groups, here {groups}, divide batch_size={config.batch_size}'
  if expected:
    raise ConfigError('rollout.sampling_tensor', tensor, expected)
  return make_mesh(MeshConfig(data=groups, tensor=tensor), mesh.devices.flatten().tolist())


def _weights_folder(asked: str | None, folder: pathlib.Path) -> pathlib.Path:
  """A folder that is this run's alone: what lies in it is deleted."""
  if asked is None:
    return folder / 'weights'
  own = zlib.crc32(str(folder.absolute()).encode())
  return pathlib.Path(asked) / f'rlhf_jax-{folder.name}-{own:08x}'


def _served(parts: Parts, folder: pathlib.Path, weights: pathlib.Path, copies: int) -> Served:
  """The policy as checkpoint folders have it, with what it was trained in part put together."""
  if 'policy' in parts.parents:
    assets = assets_of(parts.parents['policy'])
  else:
    assets = hf_export.Assets(folder / 'tokenizer')
  hf_export.family_of(weights, parts.model, assets)
  merge = jax.jit(functools.partial(adapters.merge, parts.model))
  whole = parts.config.adapter.method == 'none'

  def export(target: pathlib.Path, params: Roles) -> None:
    policy: Any = params['policy'] if whole else merge(params['policy'])
    dtype = parts.config.rollout.server.dtype
    hf_export.export_policy(target, parts.model, policy, assets, dtype=dtype)

  return Served(export, parts.model.vocab_size, parts.tokenizer.pad_id, copies)
