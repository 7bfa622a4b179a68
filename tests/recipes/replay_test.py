"""A step that went wrong is made again bit for bit, and what was put into it is what is found."""

import dataclasses
import pathlib
from typing import Any
from unittest import mock

import numpy as np
import pytest

from rlhf_jax.common.errors import NonFiniteError
from rlhf_jax.recipes import replay as replay_lib
from rlhf_jax.recipes.replay import Replay
from rlhf_jax.runs import Run
from rlhf_jax.training import dumps
from rlhf_jax.training.checkpoints import CheckpointConfig
from rlhf_jax.training.optimizer import OptimizerConfig
from tests import tiny
from tests.training.skipping_test import SKIP, poisoned, reward_config

pytestmark = pytest.mark.slow


def stop(config: Any, folder: pathlib.Path, wrap: Any = lambda recipe: recipe) -> None:
  with pytest.raises(NonFiniteError):
    tiny.run_stage(config, folder, wrap=wrap)


def again(folder: pathlib.Path, wrap: Any = lambda recipe: recipe) -> Replay:
  """The last step that was kept, made again."""
  run = Run(folder)

  def build(*arguments: Any) -> Any:
    built = real(*arguments)
    return built._replace(recipe=wrap(built.recipe))

  real = replay_lib.build
  dump = dumps.load(folder, dumps.steps(folder)[-1])
  with tiny.devices(1), mock.patch.object(replay_lib, 'build', build):
    return replay_lib.replay(run, dump, tiny.feedback_of(run.config.data.response_length))


OVERFLOW = OptimizerConfig(name='sgd', learning_rate=1e38, clip_norm=0.0)


def test_sft_whose_parameters_were_thrown_away(tmp_path: pathlib.Path) -> None:
  """The step before made them huge; there is no checkpoint, so it begins at the beginning."""
  stop(tiny.make_config('sft', optimizer=OVERFLOW), tmp_path / 'run')
  found = again(tmp_path / 'run')
  assert (found.step, found.checkpoint, found.differing) == (2, None, [])
  assert found.largest['policy'] > 1e30 and found.examined.found
  assert found.examined.losses is not None and not np.isfinite(found.examined.losses).any()
  assert found.examined.gradients and found.ratios == {}
  prompt, response = found.texts(0)
  assert prompt and response


def test_dpo_with_one_bad_number_in_its_batch(
  parents: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """From the checkpoint before: leaf, row and row's loss; the other rows are well."""
  config = tiny.make_config('dpo', parents, checkpoint=CheckpointConfig(every=2))
  stop(config, tmp_path / 'run', poisoned(4))
  found = again(tmp_path / 'run', poisoned(4))
  assert (found.step, found.checkpoint, found.differing) == (4, 2, [])
  assert not found.parameters and not found.optimizer
  assert replay_lib.rows_of(found.now.batch['reference_logprobs']) == [3]
  assert found.examined.losses is not None
  assert np.flatnonzero(~np.isfinite(found.examined.losses)).tolist() == [3]
  assert np.isnan(found.ratios['the reference'].largest) and found.ratios['the reference'].row == 3
  assert len(found.texts(3)) == 3, 'a prompt and two responses'
  healthy = again(tmp_path / 'run')
  assert not healthy.examined.found and not healthy.close and found.close
  assert 'batch reference_logprobs' in healthy.differing and 'metric loss' in healthy.differing


def test_ppo_with_a_bad_reward(parents: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """The samples that the function had no answer for, with the texts that it was asked about."""
  config = reward_config('ppo', parents, tmp_path, 12, checkpoint=CheckpointConfig(every=1))
  stop(config, tmp_path / 'run')
  found = again(tmp_path / 'run')
  assert found.differing == [] and found.checkpoint == (found.step - 1 or None)
  ((name, scores),) = found.now.rewards.items()
  bad = replay_lib.rows_of(scores)
  assert name.endswith('reward.py:score') and 0 < len(bad) < len(scores)
  assert found.examined.found and found.examined.updates == 4
  assert found.ratios.keys() == {'the policy that sampled', 'the reference'}
  assert found.ratios['the policy that sampled'].largest < 1e-4
  scope: dict[str, Any] = {}
  exec((tmp_path / 'reward.py').read_text(), scope)  # the test's own file
  for row in range(len(scores)):
    prompt, response = found.sampled(row)
    assert np.isnan(scope['score']([prompt], [response])[0]) == (row in bad)


def test_a_skipped_step_is_made_again_from_before_it(
  parents: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """The run went on and has later checkpoints: the one before the step is taken."""
  config = tiny.make_config('dpo', parents, health=SKIP)
  config = dataclasses.replace(config, checkpoint=CheckpointConfig(every=3, keep=4))
  tiny.run_stage(config, tmp_path / 'run', wrap=poisoned(5))
  found = again(tmp_path / 'run', poisoned(5))
  assert (found.step, found.checkpoint, found.differing) == (5, 3, [])
  assert found.examined.found
