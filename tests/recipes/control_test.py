"""Stages on the embedded control task: CPL recovers the optimum, P-IQL learns what it needs."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax import stages
from rlhf_jax.common.errors import ConfigError, DataError, RunError
from rlhf_jax.config import RewardModelInitConfig, load_config
from rlhf_jax.models import gaussian
from rlhf_jax.models.gaussian import GaussianPolicyConfig
from rlhf_jax.objectives.cpl import CPLConfig
from rlhf_jax.objectives.iql import IQLConfig
from rlhf_jax.objectives.kto import KTOConfig
from rlhf_jax.objectives.orpo import ORPOConfig
from rlhf_jax.objectives.ppo import PPOConfig
from rlhf_jax.objectives.reward_model import RewardModelConfig
from rlhf_jax.objectives.reward_process import ProcessRewardConfig
from rlhf_jax.recipes import control
from rlhf_jax.recipes.finished import open_run, own_questions
from rlhf_jax.recipes.probes import ask
from rlhf_jax.sharding.mesh import MeshConfig
from tests import tiny


def small(name: str, **changes: Any) -> Any:
  """A config of control with few pairs and steps, without a start."""
  config = load_config(f'configs/{name}.py')
  config.data.lqr.pairs, config.data.held_out = 64, 16.0
  config.log.tensorboard = False
  config.evaluation = dataclasses.replace(config.evaluation, records=16, batch_size=8, every=0)
  config.policy.init = config.reward_model.init = None
  return dataclasses.replace(config, **{'steps': 4, 'batch_size': 16, **changes})


def run(config: Any, folder: pathlib.Path) -> Any:
  """The finished run's result.json."""
  result = tiny.run_stage(config, folder).outcome.run.result
  assert result is not None
  return result


@pytest.fixture(scope='module')
def cloned(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Behaviour cloning with the committed settings: where the CPL stages start."""
  folder = tmp_path_factory.mktemp('lqr') / 'sft'
  config = load_config('configs/lqr_sft.py')
  config.log.tensorboard = False
  run(config, folder)
  return folder


def cpl(cloned: pathlib.Path, labels: str = 'regret', lam: float = 1.0) -> Any:
  """The committed CPL stage, possibly with other labels or settings."""
  config = load_config(f'configs/lqr_cpl.py:{labels}')
  config.policy.init = str(cloned)
  config.log.tensorboard = False
  config.objective = CPLConfig(alpha=1.0, lam=lam)
  return config


@pytest.mark.slow
def test_cpl_finds_the_optimal_gain(cloned: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """Exact with regret labels, alpha 1 and lambda 1; a bias or return labels are visibly worse."""
  exact = run(cpl(cloned), tmp_path / 'exact')
  assert exact['gain_error'] < 0.05
  assert exact['cost'] == pytest.approx(exact['optimal_cost'], rel=0.01)
  biased = run(cpl(cloned, lam=0.5), tmp_path / 'biased')
  returns = run(cpl(cloned, labels='return'), tmp_path / 'returns')
  for worse in (biased, returns):
    assert worse['gain_error'] > 0.25
    assert worse['cost'] is None or worse['cost'] > 1.05 * exact['cost']


def test_a_stage_on_behalf_of_another_has_its_data(tmp_path: pathlib.Path) -> None:
  """CPL's start is cloned on CPL's own pairs; the whole chain runs by one command and again."""
  config = small('lqr_cpl')
  config.policy.init = 'configs/lqr_sft.py'
  with tiny.devices(1):
    first = stages.run_stage(config, tmp_path / 'run', root=tmp_path)
    again = stages.run_stage(config, tmp_path / 'again', root=tmp_path)
  assert first.run.params_sha256 == again.run.params_sha256
  assert [folder.name[:7] for folder in (tmp_path / 'stages').iterdir() if folder.is_dir()] == [
    'lqr_sft'
  ]


@pytest.mark.parametrize('name', ['lqr_cpl', 'lqr_piql', 'lqr_reward_model', 'lqr_sft'])
def test_resuming_gives_the_same_bits(name: str, tmp_path: pathlib.Path) -> None:
  """Two steps, a checkpoint, two more: as four in one go, V, Q and their slow copies included."""
  whole = run(small(name), tmp_path / 'whole')
  config = small(name)
  config.checkpoint.every = 2

  def stop(recipe: Any) -> Any:
    def update(state: Any, batch: Any) -> Any:
      if int(state.step) == 2:
        raise KeyboardInterrupt
      return recipe.update(state, batch)

    return recipe._replace(update=update)

  with pytest.raises(KeyboardInterrupt):
    tiny.run_stage(config, tmp_path / 'parts', wrap=stop)
  assert run(config, tmp_path / 'parts')['params_sha256'] == whole['params_sha256']


def test_rewards_of_steps_come_from_the_reward_model(tmp_path: pathlib.Path) -> None:
  """P-IQL learns from the model's rewards, IQL without one from the task's; not of a last step."""
  judge = small('lqr_reward_model')
  run(judge, tmp_path / 'judge')
  config = small('lqr_piql')
  feedback: Any = stages.load_data(config.data, tmp_path)
  with tiny.devices(1):
    true = control.load_control(config, {}, feedback)
    parents = {'reward_model': stages.Run(tmp_path / 'judge')}
    learnt = control.load_control(config, parents, feedback)
    own, model = control.encode(true, 'train').rows, control.encode(learnt, 'train').rows
  segments = own.sequences
  np.testing.assert_allclose(
    own.score, feedback.task.reward(segments.states, segments.actions), rtol=1e-5
  )
  assert not np.allclose(own.score, model.score)
  np.testing.assert_array_equal(own.score_mask.sum(-1), config.data.lqr.horizon - 1)
  assert not own.score_mask[:, -1].any()


def test_slow_copies_follow_q(tmp_path: pathlib.Path) -> None:
  """After one update the target has gone the target rate's part of the way to Q."""
  rate = 0.25
  config = small('lqr_piql', steps=1, objective=IQLConfig(target_rate=rate))
  state = tiny.run_stage(config, tmp_path / 'run').loop.state
  built = tiny_build(config, tmp_path)
  start = built.recipe.init()
  jax.tree.map(
    lambda old, new, slow: np.testing.assert_allclose(slow, old + rate * (new - old), atol=1e-6),
    start.targets['q_target'],
    {'q': state.params['q_heads']['q']},
    state.targets['q_target'],
  )


def tiny_build(config: Any, root: pathlib.Path) -> Any:
  """The recipe of a config without parents."""
  with tiny.devices(1):
    return stages.build(config, {}, stages.load_data(config.data, root))


def test_a_finished_run_is_asked_again(tmp_path: pathlib.Path) -> None:
  """Opened with its data it gives its last evaluation again; without texts nothing is sampled."""
  config = small('lqr_cpl')
  finished = tiny.run_stage(config, tmp_path / 'run').outcome.run
  feedback = stages.load_data(config.data, tmp_path)
  mesh = jax.make_mesh((1, 1, 1), ('data', 'fsdp', 'tensor'), devices=jax.devices()[:1])
  opened = open_run(finished, config, feedback, mesh, parents={})
  with jax.set_mesh(mesh):
    answers = ask(own_questions(opened.parts), opened.params, 4)
  result = finished.result
  assert result is not None
  for name, value in answers.scalars.items():
    assert value == pytest.approx(result['evaluation'][name], rel=1e-5), name
  with pytest.raises(RunError, match='control'):
    open_run(finished, config, tiny.feedback_of(6), mesh, parents={})


def test_simulated_cost_is_the_exact_one(tmp_path: pathlib.Path) -> None:
  """Of a linear policy; episodes are few, so within a few per cent."""
  task: Any = stages.load_data(small('lqr_cpl').data, tmp_path).task
  found = control.simulated_cost(task, lambda states: states @ task.gain.T)
  assert found == pytest.approx(task.optimal_cost, rel=0.1)


def test_a_policy_with_hidden_layers_is_simulated(tmp_path: pathlib.Path) -> None:
  """It has no gain, and a cost all the same."""
  config = small('lqr_cpl', model=GaussianPolicyConfig(hidden=(8,), bias=True))
  result = run(config, tmp_path / 'run')
  assert result['gain_error'] is None and result['cost'] > result['optimal_cost']


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'model': tiny.MODEL}, 'GaussianPolicyConfig'),
    ({'objective': ORPOConfig()}, 'densities'),
    ({'objective': KTOConfig()}, 'cpl, iql'),
    ({'objective': PPOConfig()}, 'PPOConfig'),
    ({'objective': ProcessRewardConfig()}, 'ProcessRewardConfig'),
    ({'objective': RewardModelConfig()}, 'normalization'),
    ({'reward_model': RewardModelInitConfig(init='a')}, 'not paid by one'),
    (
      {
        'objective': IQLConfig(),
        'reward_model': RewardModelInitConfig(init='a', ensemble=('b',)),
      },
      'ensemble',
    ),
    ({'data': tiny.make_config('sft').data}, 'ModelConfig'),
  ],
)
def test_impossible_combinations_are_refused(changes: Any, said: str) -> None:
  """Texts and control have policies and objectives of their own."""
  with pytest.raises(ConfigError, match=said):
    small('lqr_cpl', **changes).validate()
  with pytest.raises(ConfigError, match='ILQL'):
    tiny.make_config('sft', objective=IQLConfig()).validate()


def test_there_are_only_segments(tmp_path: pathlib.Path) -> None:
  """What else is asked for is refused with what there is."""
  feedback = stages.load_data(small('lqr_cpl').data, tmp_path)
  with pytest.raises(DataError, match='no ratings.*CPL'):
    feedback.require('train', 'ratings')


def test_a_policy_is_no_reward_model(tmp_path: pathlib.Path) -> None:
  """A parent of the wrong kind is named with its field."""
  run(small('lqr_sft'), tmp_path / 'sft')
  config = small('lqr_piql')
  config.reward_model.init = str(tmp_path / 'sft')
  with pytest.raises(ConfigError, match=r'reward_model\.init.*the run of a reward model'):
    with tiny.devices(1):
      stages.run_stage(config, tmp_path / 'run', root=tmp_path)


def test_rows_may_be_split_over_devices(tmp_path: pathlib.Path) -> None:
  """Eight devices give the gain of one, to float error."""
  gains = []
  for count in (1, 8):
    config = small('lqr_cpl', mesh=MeshConfig())
    with tiny.devices(count):
      stages.run_stage(config, tmp_path / f'on{count}', root=tmp_path)
      built: Any = stages.build(config, {}, stages.load_data(config.data, tmp_path))
      policy = stages.Run(tmp_path / f'on{count}').restore_role(
        'policy', built.recipe.abstract.params['policy']
      )
    gains.append(np.asarray(gaussian.gain(built.model, policy)))
  np.testing.assert_allclose(gains[1], gains[0], rtol=1e-4, atol=1e-5)
