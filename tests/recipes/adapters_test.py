"""Stages that train a part of their decoders: what is trained, kept, resumed and handed on."""

import dataclasses
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax import stages
from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.common import trees
from rlhf_jax.common.errors import ConfigError, RunError
from rlhf_jax.config import InitConfig, RewardModelInitConfig
from rlhf_jax.models import adapters
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.roles import abstract_reward_model
from rlhf_jax.objectives.ppo import PPOConfig
from rlhf_jax.recipes.parts import abstract_decoder
from rlhf_jax.runs import Run
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh
from tests import tiny

pytestmark = pytest.mark.slow

LORA = AdapterConfig(method='lora', rank=2, alpha=4.0, targets=('query', 'value', 'down'))
TOP = AdapterConfig(method='last_layers')
MODEL = dataclasses.replace(tiny.MODEL, layers=2)
PARTS: dict[str, Any] = {'lora': LORA, 'last_layers': TOP}
VALUES = {
  f'ppo {kind}': PPOConfig(epochs=2, minibatches=2, value_model=kind)
  for kind in ('shared', 'separate', 'reward_model')
}


@pytest.fixture(scope='module')
def deep(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Finished parents of two layers."""
  folder = tmp_path_factory.mktemp('deep')
  with tiny.devices(1):
    for case in ('sft', 'reward_model'):
      config = tiny.make_config(case, folder, steps=2, model=MODEL)
      stages.run_stage(config, folder / case, root=folder)
  return folder


def make_config(case: str, folder: pathlib.Path, kind: str, **changes: Any) -> Any:
  """A tiny stage that is trained in part; SFT too starts from a finished policy."""
  name = case.partition(' ')[0]
  if case in VALUES:
    changes['objective'] = VALUES[case]
  config = tiny.make_config(name, folder, adapter=PARTS[kind], model=MODEL, **changes)
  return dataclasses.replace(config, policy=InitConfig(init=str(folder / 'sft')))


def names(tree: Any) -> set[str]:
  """The last names of a tree's leaves."""
  return {name.rpartition('.')[2] for name in trees.flatten(tree)}


@pytest.mark.parametrize('kind', list(PARTS))
@pytest.mark.parametrize('case', ['reward_model', 'dpo', 'ilql', *VALUES])
def test_only_the_part_moves(case: str, kind: str, deep: pathlib.Path) -> None:
  """Its gradient moves every trained tree; moments are of those alone; what is frozen stays.

  A policy that has not moved has no KL to its reference.
  """
  built = tiny.build_recipe(make_config(case, deep, kind))
  recipe = built.recipe
  with jax.set_mesh(built.mesh):
    state = recipe.init()
    before = jax.device_get(state.params)
    moments = [leaf.shape for leaf in jax.tree.leaves(state.opt_state)]
    shapes = [leaf.shape for leaf in jax.tree.leaves(before)]
    assert sorted(filter(None, moments)) == sorted(2 * list(filter(None, shapes)))
    untouched = recipe.prepare(state, recipe.batch(0))
    if 'kl' in untouched.metrics:
      assert abs(metrics_lib.values(untouched.metrics)['kl']) < 1e-6
    for step in range(2):  # B starts at 0: A moves from the second update on
      prepared = recipe.prepare(state, recipe.batch(step))
      state = dataclasses.replace(state, carry=prepared.carry)
      state, _ = recipe.update(state, prepared.batch)
  for role, tree in before.items():
    decoder = tree.get('trunk', tree)
    if role in ('policy', 'value_trunk', 'reward_model') and kind == 'lora':
      assert names(decoder) == {'lora_a', 'lora_b'}
    elif role in ('policy', 'value_trunk', 'reward_model'):
      assert decoder.keys() == {'top_layers', 'final_norm'}
    same = jax.tree.map(np.array_equal, tree, jax.device_get(state.params[role]))
    moved = [name for name, value in trees.flatten(same).items() if not value]
    assert moved, role


@pytest.mark.parametrize('kind', list(PARTS))
@pytest.mark.parametrize('case', ['sft', 'reward_model'])
def test_a_finished_part_is_put_together(
  case: str, kind: str, deep: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """The checkpoint holds the part; whoever opens the run gets the whole, as training had it."""
  finished = tiny.run_stage(make_config(case, deep, kind, steps=3), tmp_path / 'part')
  run, role = Run(tmp_path / 'part'), 'reward_model' if case == 'reward_model' else 'policy'
  mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
  make = abstract_reward_model if case == 'reward_model' else abstract_decoder
  restored = run.restore_role(role, make(run.model, mesh))
  trained = finished.loop.state.params[role]
  base = Run(deep / 'sft').restore_role('policy', abstract_decoder(run.model, mesh))
  base = adapters.base_of(PARTS[kind], base)
  part = trained if case == 'sft' else trained['trunk']
  joined = adapters.join(adapters.frozen_of(PARTS[kind], run.model, base), part)
  whole = restored if case == 'sft' else restored['trunk']
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    whole,
    adapters.merge(run.model, joined),
  )
  if case == 'reward_model':
    assert float(restored['normalizer']['bias']) == float(trained['normalizer']['bias']) != 0
  count = sum(leaf.size for leaf in jax.tree.leaves(part))
  assert count < 0.6 * sum(leaf.size for leaf in jax.tree.leaves(whole))
  identity = run.params_identity('final')
  assert identity.endswith(f' on {Run(deep / "sft").params_identity("final")}')


@pytest.mark.parametrize('case', ['ppo separate', 'ppo reward_model'])
def test_a_value_trunk_is_put_together(
  case: str, deep: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """It started from the policy or from the reward model, and that is what it is merged with."""
  finished = tiny.run_stage(make_config(case, deep, 'lora', steps=2), tmp_path / 'part')
  run, mesh = Run(tmp_path / 'part'), make_mesh(MeshConfig(), devices=jax.devices()[:1])
  abstract = abstract_decoder(run.model, mesh)
  restored = run.restore_role('value_trunk', abstract)
  if case == 'ppo separate':
    base = Run(deep / 'sft').restore_role('policy', abstract)
  else:
    judge = abstract_reward_model(run.model, mesh)
    base = Run(deep / 'reward_model').restore_role('reward_model', judge)['trunk']
  trained = finished.loop.state.params['value_trunk']
  joined = adapters.join(adapters.frozen_of(LORA, run.model, base), trained)
  expected = adapters.merge(run.model, joined)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), restored, expected)


@pytest.mark.parametrize('case', ['dpo', 'ppo separate'])
def test_resumes_to_the_bit(case: str, deep: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """Two of four steps, and the rest in another process's place: as four at once."""
  config = make_config(case, deep, 'lora', steps=4)
  config.checkpoint.every = 2
  whole = tiny.run_stage(config, tmp_path / 'whole')

  class Killed(BaseException):
    pass

  def killed(recipe: Any) -> Any:
    def batch(step: int) -> Any:
      if step == 3:
        raise Killed
      return recipe.batch(step)

    return recipe._replace(batch=batch)

  with pytest.raises(Killed):
    tiny.run_stage(config, tmp_path / 'parts', wrap=killed)
  resumed = tiny.run_stage(config, tmp_path / 'parts')
  assert trees.sha256(resumed.loop.state) == trees.sha256(whole.loop.state)


def test_a_child_starts_from_the_whole(deep: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """A stage on a part, trained whole or in part again; and what happens when the base is gone."""
  home = tmp_path / 'home'
  shutil.copytree(deep / 'sft', home / 'sft')
  first = dataclasses.replace(
    make_config('sft', deep, 'lora', steps=2), policy=InitConfig(init=str(home / 'sft'))
  )
  tiny.run_stage(first, home / 'first')
  second = make_config('dpo', deep, 'lora', steps=2)
  second = dataclasses.replace(second, policy=InitConfig(init=str(home / 'first')))
  tiny.run_stage(second, home / 'second')
  mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
  run = Run(home / 'second')
  run.restore_role('policy', abstract_decoder(run.model, mesh))
  shutil.move(home / 'sft', home / 'elsewhere')
  with pytest.raises(RunError, match='sft, which is not there any more. Put it back.'):
    run.restore_role('policy', abstract_decoder(run.model, mesh))


@pytest.mark.parametrize(
  ('case', 'changes', 'field'),
  [
    ('sft', {'policy': InitConfig()}, 'policy.init'),
    ('ppo', {'adapter': dataclasses.replace(LORA, dropout=0.1)}, 'adapter.dropout'),
    ('dpo', {'adapter': dataclasses.replace(LORA, targets=('q',))}, 'adapter.targets'),
  ],
)
def test_what_cannot_work_is_refused(case: str, changes: Any, field: str) -> None:
  config = dataclasses.replace(make_config(case, pathlib.Path('x'), 'lora'), **changes)
  with pytest.raises(ConfigError) as caught:
    config.validate()
  assert caught.value.field == field


def test_a_value_trunk_must_have_the_layers(deep: pathlib.Path, parents: pathlib.Path) -> None:
  """The reward model's decoder may be another than the policy's, and too shallow for the part."""
  config = make_config('ppo reward_model', deep, 'last_layers')
  config.reward_model = RewardModelInitConfig(init=str(parents / 'reward_model'))
  with pytest.raises(ConfigError, match='fewer than the 1 layers'):
    tiny.build_recipe(config)
