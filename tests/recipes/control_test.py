"""Stages on the embedded control task: CPL recovers the optimum, P-IQL learns what it needs."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax import reading, stages
from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.common.errors import ConfigError, DataError, RunError
from rlhf_jax.config import RewardModelInitConfig, load_config
from rlhf_jax.models import gaussian
from rlhf_jax.models.gaussian import GaussianPolicyConfig
from rlhf_jax.objectives.cpl import CPLConfig
from rlhf_jax.objectives.cpl_scored import ScoredCPLConfig
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
from rlhf_jax.training.optimizer import OptimizerConfig
from tests import tiny


def small(name: str, **changes: Any) -> Any:
  """A config of control with few pairs and steps, without a start."""
  file, _, argument = name.partition(':')
  config = load_config(f'configs/{file}.py:{argument}' if argument else f'configs/{file}.py')
  lqr = config.data.lqr
  lqr.pairs, lqr.ratings, lqr.rankings, config.data.held_out = 64, 64, 32, 16.0
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


@pytest.mark.slow
@pytest.mark.parametrize('pairs', ['', ':rankings'], ids=['batch', 'rankings'])
def test_all_pairs_of_scores_find_it_too(
  pairs: str, cloned: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """Dense CPL, on pairs of whole batches and of rankings."""
  config = load_config(f'configs/lqr_cpl_dense.py{pairs}')
  config.policy.init = str(cloned)
  config.log.tensorboard = False
  result = run(config, tmp_path / 'run')
  assert result['gain_error'] < 0.05
  assert result['cost'] == pytest.approx(result['optimal_cost'], rel=0.01)


NAMES = ['lqr_cpl', 'lqr_cpl_dense', 'lqr_piql', 'lqr_reward_model', 'lqr_sft']


@pytest.mark.parametrize('name', NAMES)
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
  feedback: Any = reading.load_data(config.data, tmp_path)
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
    return stages.build(config, {}, reading.load_data(config.data, root))


def test_a_finished_run_is_asked_again(tmp_path: pathlib.Path) -> None:
  """Opened with its data it gives its last evaluation again; without texts nothing is sampled."""
  config = small('lqr_cpl')
  finished = tiny.run_stage(config, tmp_path / 'run').outcome.run
  feedback = reading.load_data(config.data, tmp_path)
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
  task: Any = reading.load_data(small('lqr_cpl').data, tmp_path).task
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
    ({'objective': KTOConfig()}, 'cpl_scored, iql'),
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
  feedback = reading.load_data(small('lqr_cpl').data, tmp_path)
  with pytest.raises(DataError, match='no prompts.*CPL'):
    feedback.require('train', 'prompts')


def test_a_policy_is_no_reward_model(tmp_path: pathlib.Path) -> None:
  """A parent of the wrong kind is named with its field."""
  run(small('lqr_sft'), tmp_path / 'sft')
  config = small('lqr_piql')
  config.reward_model.init = str(tmp_path / 'sft')
  with pytest.raises(ConfigError, match=r'reward_model\.init.*what trains a reward model'):
    with tiny.devices(1):
      stages.run_stage(config, tmp_path / 'run', root=tmp_path)


# Stages of every kind of batch, by the name of their config and what is different of it; the groups
# of pairs of 4 stay whole in 4 microbatches of 16 rows.
SPLIT: dict[str, Any] = {
  'lqr_sft': {},
  'lqr_cpl': {
    'objective': CPLConfig(alpha=1.0, lam=0.5, bc_coefficient=0.1, bc_normalization='token')
  },
  'lqr_cpl_dense groups': {
    'objective': ScoredCPLConfig(alpha=1.0, group_size=4, bc_coefficient=0.1)
  },
  'lqr_cpl_dense': {},
  'lqr_cpl_dense:rankings': {},
  'lqr_reward_model': {},
  'lqr_piql': {},
}


def one_update(name: str, accumulation: int = 1, count: int = 1) -> tuple[Any, dict[str, float]]:
  """Gradients of one step of `params - gradient`, on moved parameters, and its metrics."""
  config = small(
    name.split()[0],
    accumulation=accumulation,
    optimizer=OptimizerConfig(name='sgd', learning_rate=1.0, clip_norm=0.0),
    mesh=MeshConfig(),
    model=GaussianPolicyConfig(value_hidden=(8,)),
    **SPLIT[name],
  )
  config.validate()
  feedback = reading.load_data(config.data, pathlib.Path())
  with tiny.devices(count):
    built = stages.build(config, {}, feedback)
  recipe = built.recipe
  rng = np.random.default_rng(0)

  def move(leaf: jax.Array) -> jax.Array:
    noise = 0.1 * rng.normal(size=leaf.shape).astype(np.float32)
    return jax.device_put(np.asarray(leaf) + noise, leaf.sharding)

  with jax.set_mesh(built.mesh):
    state = recipe.init()
    state = dataclasses.replace(
      state, params=jax.tree.map(move, state.params), targets=jax.tree.map(move, state.targets)
    )
    before = jax.device_get(state.params)
    prepared = recipe.prepare(state, recipe.batch(0))
    after, metrics = recipe.update(state, prepared.batch)
    after = jax.device_get(after.params)
  return jax.tree.map(np.subtract, before, after), metrics_lib.values(jax.device_get(metrics))


@pytest.mark.parametrize(
  ('name', 'accumulation', 'count'),
  [
    (name, accumulation, count)
    for name in SPLIT
    # Pairs of a whole batch are not accumulated; they reach over devices.
    for accumulation, count in ([(1, 8)] if name == 'lqr_cpl_dense' else [(4, 1), (2, 8)])
  ],
)
def test_a_split_changes_nothing(name: str, accumulation: int, count: int, whole: Any) -> None:
  """Loss, metrics and gradients over microbatches and devices are those of one piece."""
  gradients, metrics = one_update(name, accumulation, count)
  expected, expected_metrics = whole(name)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, np.abs(b).max())),
    gradients,
    expected,
  )
  assert metrics == pytest.approx(expected_metrics, rel=1e-4, abs=1e-5)
  assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)) > 1e-3


@pytest.fixture(scope='module')
def whole() -> Any:
  """`whole(name)`: the step on one device in one piece."""
  return functools.cache(one_update)


def test_pairs_of_a_whole_batch_are_not_split_over_microbatches() -> None:
  """Each microbatch would have other pairs; devices see the whole batch."""
  with pytest.raises(ConfigError, match='accumulation=2.*group_size'):
    small('lqr_cpl_dense', accumulation=2).validate()
  config = small('lqr_cpl_dense', accumulation=2, objective=ScoredCPLConfig(group_size=16))
  with pytest.raises(ConfigError, match='whole groups'):
    config.validate()
  with pytest.raises(ConfigError, match='batch_size=1'):
    small('lqr_cpl_dense', batch_size=1).validate()


def test_rows_may_be_split_over_devices(tmp_path: pathlib.Path) -> None:
  """Eight devices give the gain of one, to float error."""
  gains = []
  for count in (1, 8):
    config = small('lqr_cpl', mesh=MeshConfig())
    with tiny.devices(count):
      stages.run_stage(config, tmp_path / f'on{count}', root=tmp_path)
      built: Any = stages.build(config, {}, reading.load_data(config.data, tmp_path))
      policy = stages.Run(tmp_path / f'on{count}').restore_role(
        'policy', built.recipe.abstract.params['policy']
      )
    gains.append(np.asarray(gaussian.gain(built.model, policy)))
  np.testing.assert_allclose(gains[1], gains[0], rtol=1e-4, atol=1e-5)
