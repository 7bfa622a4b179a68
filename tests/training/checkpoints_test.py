"""Checkpoints hold the state of their step, exactly, and refuse what does not fit."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.common import trees
from rlhf_jax.common.errors import ConfigError, RunError
from rlhf_jax.training.checkpoints import CheckpointConfig, Checkpoints
from rlhf_jax.training.state import TrainState

OPTIMIZER = optax.adam(0.1)


def make_state(step: int = 0, size: int = 8) -> TrainState:
  """A state with two roles; its numbers follow from the step."""
  params = {
    'policy': {'kernel': jnp.arange(size * 8, dtype=jnp.float32).reshape(size, 8) + step},
    'value_head': {'bias': jnp.full(1, step, jnp.float32)},
  }
  state = TrainState.create(params, OPTIMIZER, 7, {'kl_coefficient': 0.1 * jnp.float32(step)})
  return dataclasses.replace(state, step=jnp.int32(step))


def abstract_of(state: Any) -> Any:
  """Shapes, dtypes and shardings."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def opened(folder: pathlib.Path, **config: Any) -> Checkpoints:
  return Checkpoints(folder, CheckpointConfig(**config))


def test_a_checkpoint_holds_the_state_of_its_step_though_it_was_donated(
  tmp_path: pathlib.Path,
) -> None:
  """The next steps overwrite the donated buffers while the checkpoint is still being written."""

  def next_state(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: x + 1, state)

  step = jax.jit(next_state, donate_argnums=0)
  state = make_state(0, size=100_000)
  # Made anew: a host view of the state itself would keep its buffers from being donated.
  expected = trees.flatten(make_state(0, size=100_000))
  checkpoints = opened(tmp_path)
  checkpoints.save(0, state, {'tokens': 3, 'nested': {'a': [1, 0.1, -np.inf]}})
  for _ in range(5):
    before, state = state, step(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
  checkpoints.close()
  checkpoints = opened(tmp_path)
  restored, facts = checkpoints.restore(abstract_of(state))
  assert facts == {'tokens': 3, 'nested': {'a': [1, 0.1, -np.inf]}}
  found = trees.flatten(restored)
  assert found.keys() == expected.keys()
  for name in expected:
    np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert found[name].dtype == expected[name].dtype
  checkpoints.close()


def test_a_restored_state_lies_as_asked_for(tmp_path: pathlib.Path) -> None:
  """Saved on one device, restored over eight, and one role alone."""
  checkpoints = opened(tmp_path)
  state = make_state(3)
  checkpoints.save(3, state, {})
  checkpoints.close()
  checkpoints = opened(tmp_path)
  mesh = jax.make_mesh((8,), ('fsdp',), devices=jax.devices())
  split = NamedSharding(mesh, PartitionSpec('fsdp'))
  kernel = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=split)
  role = checkpoints.restore_role('policy', {'kernel': kernel}, 3)
  assert role['kernel'].sharding == split
  assert role['kernel'].addressable_shards[0].data.shape == (1, 8)
  np.testing.assert_array_equal(role['kernel'], state.params['policy']['kernel'])
  checkpoints.close()


def test_targets_and_a_nested_carry_come_back_too(tmp_path: pathlib.Path) -> None:
  """In the state, and a target's role alone; counters keep their dtype."""
  carry = {'normalizer': {'count': jnp.int32(3), 'mean': jnp.arange(2.0)}, 'rates': (jnp.ones(()),)}
  target = {'kernel': jnp.full((8, 8), 2.5), 'bias': jnp.arange(8.0)}
  state = dataclasses.replace(make_state(3), carry=carry, targets={'policy_target': target})
  checkpoints = opened(tmp_path)
  checkpoints.save(3, state, {})
  checkpoints.close()
  checkpoints = opened(tmp_path)
  restored, _ = checkpoints.restore(abstract_of(state))
  assert str(jax.tree.structure(restored)) == str(jax.tree.structure(state))
  for name, leaf in trees.flatten(state).items():
    found = trees.flatten(restored)[name]
    assert found.dtype == leaf.dtype
    np.testing.assert_array_equal(found, leaf, err_msg=name)
  role = checkpoints.restore_role('policy_target', abstract_of(target), 3)
  np.testing.assert_array_equal(role['kernel'], target['kernel'])
  checkpoints.close()


def test_the_latest_few_are_kept(tmp_path: pathlib.Path) -> None:
  checkpoints = opened(tmp_path, keep=2)
  assert checkpoints.latest_step is None
  for step in (1, 2, 3, 4):
    checkpoints.save(step, make_state(step), {})
  checkpoints.close()
  again = opened(tmp_path, keep=2)
  assert again.latest_step == 4 and again.best_step is None
  assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ['3', '4']
  again.save(4, make_state(9), {})  # written already
  restored, _ = again.restore(abstract_of(make_state()))
  assert int(restored.step) == 4
  again.close()


@pytest.mark.parametrize(('mode', 'best'), [('max', 2), ('min', 3)])
def test_the_best_is_kept_beside_the_latest(mode: str, best: int, tmp_path: pathlib.Path) -> None:
  """Steps saved between evaluations carry no metric and are never the best."""
  checkpoints = opened(tmp_path, keep=1, best_metric='gold_reward', best_mode=mode)
  for step, value in ((1, 0.5), (2, 0.9), (3, 0.1), (4, 0.4)):
    checkpoints.save(step, make_state(step), {}, {'gold_reward': value, 'length': 3.0})
  checkpoints.save(5, make_state(5), {})
  checkpoints.close()
  again = opened(tmp_path, keep=1, best_metric='gold_reward', best_mode=mode)
  assert again.best_step == best and again.latest_step == 5
  assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [str(best), '5']
  params = again.restore_role('policy', abstract_of(make_state().params['policy']), best)
  np.testing.assert_array_equal(params['kernel'], make_state(best).params['policy']['kernel'])
  again.close()


def test_an_unfinished_checkpoint_is_not_there(tmp_path: pathlib.Path) -> None:
  """What a process killed while writing leaves behind is never taken for a checkpoint."""
  checkpoints = opened(tmp_path)
  checkpoints.save(1, make_state(1), {})
  checkpoints.close()
  (tmp_path / '2.orbax-checkpoint-tmp').mkdir()
  (tmp_path / '2.orbax-checkpoint-tmp' / 'half').write_text('x')
  again = opened(tmp_path)
  assert again.latest_step == 1
  restored, _ = again.restore(abstract_of(make_state()))
  assert int(restored.step) == 1
  again.close()


@pytest.mark.parametrize(
  ('wrong', 'words'),
  [
    ({'kernel': jax.ShapeDtypeStruct((4, 8), jnp.float32)}, ('kernel', '(8, 8)', '(4, 8)')),
    ({'kernel': jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)}, ('kernel', 'float32', 'bfloat16')),
    (
      {
        'kernel': jax.ShapeDtypeStruct((8, 8), jnp.float32),
        'bias': jax.ShapeDtypeStruct((8,), jnp.float32),
      },
      ('bias', 'absent', '(8,)'),
    ),
    ({}, ('kernel', '(8, 8)', 'absent')),
  ],
)
def test_what_does_not_fit_is_refused(wrong: Any, words: Any, tmp_path: pathlib.Path) -> None:
  """The name, what was found and what was expected; orbax alone would cast or mislead."""
  checkpoints = opened(tmp_path)
  checkpoints.save(1, make_state(1), {})
  checkpoints.close()
  checkpoints = opened(tmp_path)
  with pytest.raises(RunError) as caught:
    checkpoints.restore_role('policy', wrong, 1)
  for word in words:
    assert word in str(caught.value)
  with pytest.raises(RunError, match="no 'params_critic'.*params_policy"):
    checkpoints.restore_role('critic', {}, 1)
  with pytest.raises(RunError, match='no checkpoint of step 2'):
    checkpoints.restore_role('policy', {}, 2)
  checkpoints.close()


def test_there_is_nothing_to_restore_at_first(tmp_path: pathlib.Path) -> None:
  checkpoints = opened(tmp_path)
  with pytest.raises(RunError, match='no checkpoint'):
    checkpoints.restore(abstract_of(make_state()))
  checkpoints.close()


def test_a_best_metric_must_be_measured(tmp_path: pathlib.Path) -> None:
  """The error lists what is, or says how to have something measured."""
  checkpoints = opened(tmp_path, best_metric='reward')
  checkpoints.require_metric(['kl', 'reward'])
  with pytest.raises(ConfigError, match="best_metric='reward'.* give: kl, length"):
    checkpoints.require_metric(['length', 'kl'])
  with pytest.raises(ConfigError, match='nothing.*Set evaluation.prompts'):
    checkpoints.require_metric([])
  checkpoints.close()


@pytest.mark.parametrize(('field', 'value'), [('every', -1), ('keep', 0), ('best_mode', 'largest')])
def test_impossible_settings_are_named(field: str, value: Any) -> None:
  with pytest.raises(ConfigError, match=f'checkpoint.{field}'):
    CheckpointConfig(**{field: value}).validate('checkpoint')
