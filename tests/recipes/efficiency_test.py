"""What an iteration may cost: nothing is compiled twice, and no tree is held twice."""

import dataclasses
import functools
import gc
import pathlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import pytest

from rlhf_jax.models import decoder
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.objectives.ppo import PPOConfig
from rlhf_jax.recipes import Built
from tests import tiny

pytestmark = pytest.mark.slow

# What JAX says when it traces a function, and when it compiles one (or finds it in the cache).
EVENTS = ('/jax/core/compile/jaxpr_trace_duration', '/jax/core/compile/backend_compile_duration')


@pytest.fixture
def compiled() -> Iterator[list[str]]:
  """The functions that are traced or compiled while the test runs, in their order."""
  heard: list[str] = []

  def listen(event: str, duration_secs: float, **about: str | int) -> None:
    del duration_secs
    if event in EVENTS:
      heard.append(f'{event.rpartition("/")[2]} {about.get("fun_name")}')

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield heard
  jax.monitoring.unregister_event_duration_listener(listen)


def iterate(built: Built, state: Any, number: int) -> Any:
  """One iteration, as the loop does it; the state is donated."""
  ready = built.recipe.prepare(state, built.recipe.batch(number))
  state, metrics = built.recipe.update(dataclasses.replace(state, carry=ready.carry), ready.batch)
  return state, jax.device_get(metrics), ready


@pytest.mark.parametrize('case', ['ppo', 'grpo', 'online_dpo'])
def test_nothing_is_compiled_after_the_first_iteration(
  case: str, parents: pathlib.Path, compiled: list[str]
) -> None:
  """Over three iterations whose prompts and responses have other lengths each time."""
  built = tiny.build_recipe(tiny.make_config(case, parents))
  lengths = set()
  with jax.set_mesh(built.mesh):
    state = built.recipe.init()
    state, _, _ = iterate(built, state, 0)
    assert any(what.startswith('backend_compile') for what in compiled)
    compiled.clear()
    for number in (1, 2, 3):
      prompts = built.recipe.batch(number)
      state, _, ready = iterate(built, state, number)
      answers = jax.device_get(ready.samples.response_mask).sum(1)
      lengths.add((tuple(prompts.mask.sum(1).tolist()), tuple(answers.tolist())))
  assert len(lengths) == 3
  assert compiled == []


# Whole parameter trees that an iteration holds: the policy, its two moments, the reference and the
# reward model; of a LoRA policy the reference is the base, and what is trained is next to nothing.
HELD = {'none': 5.0, 'lora': 2.0}


def live_bytes() -> int:
  """Of all arrays on one device that somebody still holds; several may be the same memory."""
  gc.collect()
  arrays = [leaf for leaf in jax.live_arrays() if len(leaf.devices()) == 1]
  return sum({leaf.unsafe_buffer_pointer(): leaf.nbytes for leaf in arrays}.values())


@pytest.fixture(scope='module')
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
  """What stages start from whose parameters are most of what they hold."""
  model = dataclasses.replace(tiny.MODEL, width=128, mlp_width=512)
  with mock.patch.object(tiny, 'MODEL', model):
    yield tiny.make_parents(tmp_path_factory.mktemp('wide'))


@pytest.mark.usefixtures('young_heap')
@pytest.mark.parametrize('method', list(HELD))
def test_a_ppo_iteration_holds_no_tree_twice(method: str, wide: pathlib.Path) -> None:
  """Live bytes before, between and after its parts, as a multiple of the decoder's parameters.

  The update itself needs room for gradients, once, and what it computes with.
  """
  adapter = AdapterConfig() if method == 'none' else AdapterConfig(method=method, rank=1)
  config = tiny.make_config('ppo', wide, adapter=adapter, objective=PPOConfig(epochs=2))
  before = live_bytes()
  built = tiny.build_recipe(config)
  with jax.set_mesh(built.mesh):
    state = built.recipe.init()
    assert isinstance(built.model, ModelConfig)
    reference = jax.eval_shape(functools.partial(decoder.init, built.model), jax.random.key(0))
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(reference))
    held = [live_bytes()]
    for number in range(2):
      ready = built.recipe.prepare(state, built.recipe.batch(number))
      held.append(live_bytes())
      state, _ = built.recipe.update(dataclasses.replace(state, carry=ready.carry), ready.batch)
      held.append(live_bytes())
    update = jax.jit(built.recipe.update, donate_argnums=0).lower(state, ready.batch).compile()
  multiples = [(each - before) / size for each in held]
  assert HELD[method] <= min(multiples) and max(multiples) < HELD[method] + 0.1
  needs = update.memory_analysis()
  # With the optimisations that tests go without it would be less.
  assert needs is not None and needs.temp_size_in_bytes / size < 2.5
