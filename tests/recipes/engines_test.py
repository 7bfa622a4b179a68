"""Stages that sample on a server learn as those that sample here, and let go of it at their end."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.common import prng, processes
from rlhf_jax.common.errors import ConfigError, RunError, ServerError
from rlhf_jax.config import EvaluationConfig
from rlhf_jax.generation.config import GenerationConfig
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.objectives import demands_of
from rlhf_jax.recipes import engines
from rlhf_jax.rollout.config import RolloutConfig, ServerConfig
from rlhf_jax.runs import Run
from rlhf_jax.sharding.mesh import MeshConfig
from tests import tiny
from tests.rollout import stand_in
from tests.rollout.stand_in import StandIn

pytestmark = pytest.mark.slow

STEPS = 2


def make_config(case: str, parents: pathlib.Path, server: StandIn | None, **changes: Any) -> Any:
  """A tiny stage that samples here, or on a server."""
  rollout = RolloutConfig()
  if server is not None:
    config = ServerConfig(
      url=server.url, dialect=server.dialect, dtype='float32', backoff=0.0, retries=1
    )
    rollout = RolloutConfig(engine='http', server=config)
  return tiny.make_config(case, parents, steps=STEPS, rollout=rollout, **changes)


def know(server: StandIn, config: Any) -> None:
  """Tells the server the keys of a run's first steps."""
  for step in range(STEPS):
    key = prng.stream_key(prng.base_key(config.seed), prng.Stream.SAMPLING, step)
    server.know(key, config.batch_size * demands_of(config.objective).samples)


def take_steps(
  config: Any, folder: pathlib.Path | None = None, devices: int = 1
) -> list[tuple[Any, Any, Any]]:
  """What each step trained on, its metrics, and the policy before it."""
  built = tiny.build_recipe(config, devices, folder)
  found = []
  with jax.set_mesh(built.mesh):
    state = built.recipe.init()
    for step in range(STEPS):
      policy = jax.device_get(state.params['policy'])
      ready = built.recipe.prepare(state, built.recipe.batch(step))
      sequences = jax.device_get(ready.samples)
      state, metrics = built.recipe.update(
        dataclasses.replace(state, carry=ready.carry), ready.batch
      )
      values = metrics_lib.values({**ready.metrics, **metrics})
      found.append((sequences, values, policy))
  built.recipe.close()
  return found


@functools.cache
def local_steps(case: str, parents: pathlib.Path) -> list[tuple[Any, dict[str, float], Any]]:
  """The steps of a stage that samples here."""
  return take_steps(make_config(case, parents, None))


@pytest.mark.parametrize(('case', 'dialect'), [('ppo', 'vllm'), ('rloo', 'sglang')])
def test_a_server_changes_nothing(
  case: str, dialect: str, parents: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """The same tokens and metrics for two steps: the server has the policy of each of them."""
  here = local_steps(case, parents)
  with stand_in.running(dialect) as server:
    config = make_config(case, parents, server)
    know(server, config)
    there = take_steps(config, tmp_path)
    assert [folder.name for folder in server.loaded] == ['00000000', '00000001']
  assert not (tmp_path / 'weights').exists()
  for (expected, values, _), (found, others, _) in zip(here, there, strict=True):
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert others['sampler_logprob_error'] < 1e-5
    assert others.keys() == values.keys()
    for name, value in values.items():
      np.testing.assert_allclose(others[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_matrices_are_merged_for_the_server(parents: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """LoRA's are within the weights that it loads, also once they have moved."""
  adapter = AdapterConfig(method='lora', rank=2)
  with stand_in.running('vllm') as server:
    config = make_config('rloo', parents, server, adapter=adapter)
    know(server, config)
    steps = take_steps(config, tmp_path)
    assert all(values['sampler_logprob_error'] < 1e-5 for _, values, _ in steps)
  assert np.abs(steps[1][2]['layers']['query']['lora_b']).max() > 0


def test_the_reference_is_handed_over_once(parents: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """Objectives that learn from its samples need no other weights."""
  with stand_in.running('sglang') as server:
    config = make_config('tilted_bc', parents, server)
    know(server, config)
    assert demands_of(config.objective).sampler == 'reference'
    steps = take_steps(config, tmp_path)
    assert [folder.name for folder in server.loaded] == ['00000000']
  assert all(values['sampler_logprob_error'] < 1e-5 for _, values, _ in steps)
  embeddings = [policy['embedding'] for _, _, policy in steps]
  assert np.abs(embeddings[0] - embeddings[1]).max() > 1e-3, 'the policy has moved'


def test_a_run_on_a_server(parents: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """From its start, over a server that fails, on another server, to its end."""
  folder = tmp_path / 'run'
  asked = EvaluationConfig(prompts=tiny.ROWS, records=0, batch_size=tiny.ROWS)
  with stand_in.running('vllm') as server:
    config = make_config('rloo', parents, server, evaluation=asked)
    config.checkpoint.every = 1
    know(server, config)
    server.spoil = lambda answer: answer if len(server.loaded) == 1 else None
    with pytest.raises(ServerError, match='not an answer of vllm'):
      tiny.run_stage(config, folder)
    assert not (folder / 'weights').exists()
    assert Run(folder).config.rollout.server == config.rollout.server
  with stand_in.running('sglang') as server:
    config = make_config('rloo', parents, server, evaluation=asked)
    config.checkpoint.every = 1
    config.rollout.server.weights = str(tmp_path / 'shared')
    know(server, config)
    done = tiny.run_stage(config, folder)
    assert [each.name for each in server.loaded] == ['00000001']
    assert server.loaded[0].parent.parent == tmp_path / 'shared'
  assert int(done.loop.state.step) == STEPS and done.outcome.run.result is not None
  assert not any((tmp_path / 'shared').iterdir())
  assert done.outcome.run.config.rollout.server == config.rollout.server


@pytest.mark.parametrize(
  ('case', 'changes'), [('ppo', {}), ('rloo', dict(adapter=AdapterConfig(method='lora', rank=2)))]
)
def test_a_mesh_of_its_own_changes_nothing(
  case: str, changes: Any, parents: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Trained over fsdp, sampled by pairs of devices that have half of the heads each."""
  seen: list[dict[str, int]] = []
  real = engines.LocalEngine

  def make(sampler: Any, *arguments: Any) -> Any:
    def watched(params: Any, prompts: Any, key: Any) -> Any:
      seen.append(dict(jax.sharding.get_abstract_mesh().shape))
      return sampler(params, prompts, key)

    return real(watched, *arguments)

  monkeypatch.setattr(engines, 'LocalEngine', make)
  found = []
  for tensor in (0, 2):
    config = tiny.make_config(case, parents, mesh=MeshConfig(data=1, fsdp=4), **changes)
    config.rollout.sampling_tensor = tensor
    found.append(take_steps(config, devices=4))
  assert seen == [{'data': 1, 'fsdp': 4, 'tensor': 1}, {'data': 2, 'fsdp': 1, 'tensor': 2}]
  for (expected, values, _), (others, numbers, _) in zip(*found, strict=True):
    jax.tree.map(np.testing.assert_array_equal, others, expected)
    assert numbers == pytest.approx(values, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
  ('tensor', 'changes', 'message'),
  [
    (3, {}, 'a divisor of the number of devices, 4'),
    (4, {}, 'a divisor of the heads, 2'),
    (1, dict(batch_size=2, mesh=MeshConfig(data=2, tensor=2)), 'their groups, here 4, divide'),
  ],
)
def test_a_mesh_that_does_not_fit(
  tensor: int, changes: Any, message: str, parents: pathlib.Path
) -> None:
  config = tiny.make_config('rloo', parents, **changes)
  config.rollout.sampling_tensor = tensor
  with pytest.raises(ConfigError, match=f'rollout.sampling_tensor.*{message}'):
    tiny.build_recipe(config, 4)


def test_what_a_server_cannot_do(
  parents: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Steps are not made again, and several processes do not share one."""
  config = make_config('rloo', parents, StandIn('vllm', 'http://127.0.0.1:9'))
  with pytest.raises(RunError, match='cannot be made anew'):
    tiny.build_recipe(config)
  with pytest.raises(ServerError, match='127.0.0.1:9/health'):
    tiny.build_recipe(config, folder=tmp_path)
  monkeypatch.setattr(processes, 'several', lambda: True)
  with pytest.raises(ConfigError, match='several processes'):
    tiny.build_recipe(config, folder=tmp_path)


def test_sampling_in_another_type(parents: pathlib.Path) -> None:
  """The trainer measures how far its own log-probs are from those of a bfloat16 sampler."""
  exact = local_steps('rloo', parents)
  config = make_config('rloo', parents, None, generation=GenerationConfig(dtype='bfloat16'))
  errors = [values['sampler_logprob_error'] for _, values, _ in take_steps(config)]
  assert all(1e-4 < error < 0.2 for error in errors), errors
  assert all(values['sampler_logprob_error'] < 1e-5 for _, values, _ in exact)


def test_short_prompts_take_short_programs(parents: pathlib.Path) -> None:
  """Two steps with buckets are two steps without."""
  whole = local_steps('rloo', parents)
  config = make_config('rloo', parents, None)
  config.rollout.prompt_buckets = 2
  for (expected, values, _), (found, others, _) in zip(whole, take_steps(config), strict=True):
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    np.testing.assert_allclose(others['loss'], values['loss'], rtol=1e-4, atol=1e-6)


def test_a_sampler_in_another_type_than_its_start_does_not_say_the_log_probs(
  parents: pathlib.Path,
) -> None:
  """What the start computes in is known once it is there."""
  config = tiny.make_config('ppo', parents)
  config.rollout.old_logprobs, config.generation.dtype = 'sampler', 'bfloat16'
  config.validate()
  with pytest.raises(ConfigError, match=r"generation.dtype='bfloat16' and model.dtype='float32'"):
    tiny.build_recipe(config, 1)
