"""Checkpoints hold the state of their step, exactly, and refuse what does not fit."""

import dataclasses
import math
import pathlib
import shutil
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


def test_what_is_not_finite_is_never_the_best(tmp_path: pathlib.Path) -> None:
  """Nor does it hide the one that is."""
  checkpoints = opened(tmp_path, keep=1, best_metric='gold_reward')
  for step, value in ((1, 3.0), (2, math.nan), (3, 2.0), (4, -math.inf), (5, 1.0)):
    checkpoints.save(step, make_state(step), {}, {'gold_reward': value})
  checkpoints.close()
  again = opened(tmp_path, keep=1, best_metric='gold_reward')
  assert again.best_step == 1 and again.latest_step == 5
  assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ['1', '5']
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
    ({'kernel': jax.ShapeDtypeStruct((4, 8), jnp.float32)}, ('kernel', '[8, 8]', '[4, 8]')),
    ({'kernel': jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)}, ('kernel', 'float32', 'bfloat16')),
    (
      {
        'kernel': jax.ShapeDtypeStruct((8, 8), jnp.float32),
        'bias': jax.ShapeDtypeStruct((8,), jnp.float32),
      },
      ('bias', 'absent', '[8]'),
    ),
    ({}, ('kernel', '[8, 8]', 'absent')),
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


def written(folder: pathlib.Path) -> pathlib.Path:
  """The checkpoints of steps 2 and 3, and the metric that keeps the best."""
  checkpoints = opened(folder, best_metric='reward')
  for step in (2, 3):
    checkpoints.save(step, make_state(step), {'tokens': step}, {'reward': float(step)})
  checkpoints.close()
  return folder


def truncate(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: pathlib.Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) * 2 // 3] ^= 1
  path.write_bytes(content)


def test_whatever_file_is_damaged_the_step_before_is_taken(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """Each file that counts, in turn; the damage is named, and the place is free for the step."""
  whole = written(tmp_path / 'whole')
  data = next((whole / '3' / 'rest' / 'd').iterdir()).name
  for name, damage in (
    ('_CHECKPOINT_METADATA', truncate),
    ('_CHECKPOINT_METADATA', flip),
    ('metrics/metrics', truncate),
    ('metrics/metrics', flip),
    ('params_policy/_METADATA', pathlib.Path.unlink),
    ('params_policy/manifest.ocdbt', truncate),
    (f'rest/d/{data}', truncate),
    (f'rest/d/{data}', flip),
    (f'rest/d/{data}', pathlib.Path.unlink),
  ):
    folder = tmp_path / 'run' / 'checkpoints'
    shutil.copytree(whole, folder)
    damage(folder / '3' / name)
    checkpoints = opened(folder, best_metric='reward')
    state, facts = checkpoints.restore(abstract_of(make_state()))
    assert int(state.step) == 2 and facts == {'tokens': 2}
    assert checkpoints.latest_step == checkpoints.best_step == 2
    expected = jax.tree.leaves(make_state(2))
    for leaf, wanted in zip(jax.tree.leaves(state), expected, strict=True):
      np.testing.assert_array_equal(leaf, wanted)
    said = capsys.readouterr().out
    assert f'{folder}/3' in said and 'this checkpoint is damaged' in said
    assert (tmp_path / 'run' / 'damaged' / '3.0').is_dir()
    checkpoints.save(3, make_state(3), {'tokens': 3}, {'reward': 3.0})
    checkpoints.close()
    shutil.rmtree(tmp_path / 'run')


def test_values_that_only_the_checksums_tell_are_noticed(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Storage that gives back zeros, say: orbax itself holds no checksum of values."""
  folder = written(tmp_path / 'checkpoints')
  checkpoints = opened(folder)
  load = checkpoints._checkpointer.load_checkpointables

  def zeroed(step: int, abstract: Any) -> Any:
    loaded = load(step, abstract)
    part = loaded['params_policy']
    return {**loaded, 'params_policy': {**part, 'kernel': part['kernel'].at[-1].set(0)}}

  monkeypatch.setattr(checkpoints._checkpointer, 'load_checkpointables', zeroed)
  abstract = abstract_of(make_state())
  with pytest.raises(RunError, match="3: .*damaged.*params_policy: 'kernel' differ.*Delete"):
    checkpoints.restore_role('policy', abstract.params['policy'], 3)
  with pytest.raises(RunError, match='/3: .*damaged.*/2: .*damaged.*no other one.*delete'):
    checkpoints.restore(abstract)
  assert sorted(path.name for path in folder.iterdir()) == ['2', '3']  # nothing was touched
  checkpoints.close()


def test_a_worse_one_does_not_pass_for_the_best(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """A digit of an older checkpoint's metric has changed: it is JSON still, but not what it was."""
  checkpoints = opened(tmp_path / 'checkpoints', keep=2, best_metric='reward')
  for step, reward in ((1, 4.0), (2, 0.5), (3, 0.25)):
    checkpoints.save(step, make_state(step), {}, {'reward': reward})
  checkpoints.close()
  path = tmp_path / 'checkpoints' / '2' / 'metrics' / 'metrics'
  path.write_text(path.read_text().replace('0.5', '9.5'))
  checkpoints = opened(tmp_path / 'checkpoints', keep=2, best_metric='reward')
  assert checkpoints.best_step == 2
  state, _ = checkpoints.restore(abstract_of(make_state()))
  assert int(state.step) == 3 and checkpoints.best_step == 1
  said = capsys.readouterr().out
  assert '/2: this checkpoint is damaged' in said and 'falling back' not in said
  assert 'the best of those that are left is step 1' in said
  checkpoints.close()


@pytest.mark.parametrize(
  'error', [MemoryError(), ValueError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.')]
)
def test_what_says_nothing_of_the_files_is_no_damage(
  error: Exception, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """A device that is full, say: no checkpoint is set aside, and nobody is told to delete one."""
  folder = written(tmp_path / 'checkpoints')
  checkpoints = opened(folder)

  def load(step: int, abstract: Any) -> Any:
    raise error

  monkeypatch.setattr(checkpoints._checkpointer, 'load_checkpointables', load)
  with pytest.raises(RunError, match='/3: it cannot be read .*Mend the cause') as caught:
    checkpoints.restore(abstract_of(make_state()))
  assert 'damaged' not in str(caught.value) and 'delete' not in str(caught.value)
  assert sorted(path.name for path in folder.iterdir()) == ['2', '3']
  checkpoints.close()


def test_the_only_checkpoint_is_not_thrown_away(tmp_path: pathlib.Path) -> None:
  """Though a kill has left half of another one beside it."""
  folder = written(tmp_path / 'checkpoints')
  shutil.rmtree(folder / '2')
  (folder / '4.orbax-checkpoint-tmp').mkdir()
  (folder / '3' / 'metrics' / 'metrics').write_text('{"rew')
  with pytest.raises(RunError, match='/3/metrics/metrics: .*damaged.*delete'):
    opened(folder, best_metric='reward')
  assert (folder / '3').is_dir()


def test_a_full_disk_is_named_and_the_last_whole_checkpoint(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """The writing fails behind the next steps: the next save, or closing, tells of it."""
  checkpoints = opened(tmp_path)
  checkpoints.save(1, make_state(1), {})
  checkpoints.close()
  checkpoints = opened(tmp_path)

  def full(*unused: Any, **unused_too: Any) -> Any:
    raise ValueError('RESOURCE_EXHAUSTED: Failed writing: No space left on device')

  monkeypatch.setattr(checkpoints._checkpointer, 'save_checkpointables_async', full)
  with pytest.raises(RunError, match='No space left on device.*last whole one: step 1.*again'):
    checkpoints.save(2, make_state(2), {})
  checkpoints.close()
