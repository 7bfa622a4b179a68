"""Reward models, ensembles of them, and several rewards, against scores computed one by one."""

import dataclasses
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax import stages
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.config import RewardModelInitConfig
from rlhf_jax.data import pipeline
from rlhf_jax.evaluation.policy import decode_sequences
from rlhf_jax.models import roles
from rlhf_jax.models.roles import abstract_reward_model
from rlhf_jax.objectives.kl_penalty import KLPenaltyConfig
from rlhf_jax.objectives.ppo import PPOConfig
from rlhf_jax.recipes.parts import Parts, load_parts
from rlhf_jax.recipes.rewards import Reading, load_reward_model, make_reward, make_score
from rlhf_jax.rollout.config import RewardConfig, RolloutConfig
from rlhf_jax.rollout.rewards import AGGREGATES
from rlhf_jax.runs import Run
from tests import tiny

pytestmark = pytest.mark.slow

COEFFICIENT = 0.7


@pytest.fixture(scope='module')
def judges(parents: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Finished reward models: 'a', 'b' and 'c' of whole responses, 'process' of tokens."""
  folder = tmp_path_factory.mktemp('judges')
  shutil.copytree(parents / 'reward_model', folder / 'a')
  for seed, name in enumerate(('b', 'c'), start=1):
    config = tiny.make_config('reward_model', parents, steps=2, seed=seed)
    tiny.run_stage(config, folder / name)
  tiny.run_stage(tiny.make_config('reward_process', parents, steps=2), folder / 'process')
  return folder


def make_config(
  parents: pathlib.Path, *members: pathlib.Path, aggregate: str = 'mean', **changes: Any
) -> Any:
  """PPO with an ensemble of reward models."""
  first, *others = map(str, members)
  reward_model = RewardModelInitConfig(
    init=first,
    ensemble=tuple(others),
    aggregate=aggregate,
    uncertainty_coefficient=COEFFICIENT if aggregate == 'uncertainty' else 1.0,
  )
  return tiny.make_config('ppo', parents, **{'reward_model': reward_model, **changes})


def parts_of(config: Any) -> Parts:
  """The pieces of a stage whose parents are finished, on one device."""
  config.validate()
  runs = {role: Run(init) for role, (init, _) in config.inits().items()}
  with tiny.devices(1):
    return load_parts(config, runs, tiny.feedback_of(config.data.response_length))


def some_sequences(parts: Parts) -> Any:
  """The first demonstrations."""
  records = parts.feedback.train.demonstrations
  columns = pipeline.encode_demonstrations(records, parts.tokenizer, parts.config.data)
  return columns.take(np.arange(8))


def scores_by(parts: Parts, folder: pathlib.Path, token: bool = False) -> np.ndarray:
  """What one reward model says of those, `[B]` or `[B, R]` float64."""
  run = Run(folder)
  params = run.restore_role('reward_model', abstract_reward_model(run.model, parts.mesh))
  judge = roles.token_reward if token else roles.reward_score
  return np.asarray(judge(run.model, params, some_sequences(parts)), np.float64)


@pytest.mark.parametrize('aggregate', AGGREGATES)
@pytest.mark.parametrize('names', ['ab', 'abc'])
def test_an_ensemble_scores_as_numpy_says(
  names: str, aggregate: str, parents: pathlib.Path, judges: pathlib.Path
) -> None:
  """Mean, worst member, or mean less coefficient x variance, of the members' own scores.

  Whether they read all rows at once or, of three members, in two parts.
  """
  parts = parts_of(make_config(parents, *(judges / name for name in names), aggregate=aggregate))
  with jax.set_mesh(parts.mesh):
    members = np.stack([scores_by(parts, judges / name) for name in names])
    loaded = load_reward_model(parts)
    assert loaded is not None
    found: Any = make_score(loaded, Reading(parts=len(names) - 1))(some_sequences(parts))
  expected = {
    'mean': members.mean(0),
    'worst': members.min(0),
    'uncertainty': members.mean(0) - COEFFICIENT * members.var(0),
  }
  np.testing.assert_allclose(found.scores, expected[aggregate], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found.disagreement, members.std(0), rtol=1e-4, atol=1e-5)
  assert found.token_rewards is None and members.std(0).max() > 1e-3


def test_an_ensemble_of_process_reward_models(parents: pathlib.Path, judges: pathlib.Path) -> None:
  """Aggregated token by token, then summed over the response; padding is paid nothing."""
  shutil.copytree(judges / 'process', judges / 'process_2', dirs_exist_ok=True)
  members = (judges / 'process', judges / 'process_2')
  parts = parts_of(make_config(parents, *members, aggregate='uncertainty'))
  with jax.set_mesh(parts.mesh):
    loaded = load_reward_model(parts)
    assert loaded is not None and loaded.by_token
    # The second member is another model: one whose opinions are stronger.
    other = jax.tree.map(lambda x: 3 * x, loaded.params[1])
    loaded = loaded._replace(params=(loaded.params[0], other))
    rows = some_sequences(parts)
    found: Any = make_score(loaded, Reading(parts=4))(rows)
    own = [roles.token_reward(loaded.models[0], tree, rows) for tree in loaded.params]
  mask = rows.response_mask
  tokens = np.where(mask, np.asarray(own, np.float64), 0.0)
  expected = tokens.mean(0) - COEFFICIENT * tokens.var(0)
  np.testing.assert_allclose(found.token_rewards, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found.scores, expected.sum(-1), rtol=1e-4, atol=1e-5)
  sums = tokens.sum(-1)
  np.testing.assert_allclose(found.disagreement, sums.std(0), rtol=1e-4, atol=1e-5)
  # Of summed scores the aggregate would be another.
  assert np.abs(found.scores - (sums.mean(0) - COEFFICIENT * sums.var(0))).max() > 1e-3


def test_a_closed_gate_pays_no_tokens_but_its_own(
  parents: pathlib.Path, judges: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """A process reward model that only gates pays where it does; one that is summed, elsewhere."""
  file = tmp_path / 'lexicon.py'
  file.write_text(LEXICON)
  parts = parts_of(make_config(parents, judges / 'process'))
  with jax.set_mesh(parts.mesh):
    rows = some_sequences(parts)
    tokens = np.where(rows.response_mask, scores_by(parts, judges / 'process', token=True), 0.0)
    own = tokens.sum(-1)
    words = np.array([len(x.split()) for x in decode_sequences(rows, parts.tokenizer.decode)[1]])
    gate, count = float(np.median(own)), RewardConfig(source=f'{file}:count')

    def paid(*rewards: RewardConfig) -> Any:
      config = dataclasses.replace(parts.config, rollout=RolloutConfig(rewards=rewards))
      config.validate()
      own_parts = dataclasses.replace(parts, config=config)
      return make_reward(own_parts, load_reward_model(parts))(rows)()

    gating = paid(RewardConfig(weight=2.0, gate_below=gate, gate_only=True), count)
    longer = float(words.max())
    gated = paid(RewardConfig(weight=2.0), dataclasses.replace(count, gate_below=longer))
  below, short = own < gate, words < longer
  assert below.any() and not below.all() and short.any() and not short.all()
  close: Any = {'rtol': 1e-4, 'atol': 1e-5}
  for found, pays, scores in (
    (gating, below, np.where(below, 2 * own, words)),
    (gated, ~short, np.where(short, words, 2 * own + words)),
  ):
    np.testing.assert_allclose(found.token_rewards, np.where(pays[:, None], 2 * tokens, 0), **close)
    np.testing.assert_allclose(found.scores, scores, **close)


def test_members_of_two_kinds_are_refused(parents: pathlib.Path, judges: pathlib.Path) -> None:
  parts = parts_of(make_config(parents, judges / 'a', judges / 'process'))
  with pytest.raises(ConfigError, match='reward_model.ensemble.*all score tokens'):
    load_reward_model(parts)


@pytest.mark.parametrize('role', ['init', 'ensemble'])
def test_a_policy_is_no_reward_model(
  role: str, parents: pathlib.Path, judges: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """Refused before anything is compiled or written, by the field that names it."""
  members = [judges / 'a', parents / 'sft']
  config = make_config(parents, *(members if role == 'ensemble' else members[::-1]))
  with tiny.devices(1), pytest.raises(ConfigError, match='trains a policy') as caught:
    stages.run_stage(config, tmp_path / 'run', root=tmp_path)
  assert caught.value.field == f'reward_model.{role}'
  assert not (tmp_path / 'run').exists()


def identity(config: Any, root: pathlib.Path) -> dict[str, Any]:
  with tiny.devices(1):
    return stages.resolve(config, root).identity


def test_members_are_part_of_a_runs_identity(
  parents: pathlib.Path, judges: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """Another member, one more, or another rule is another run; the same elsewhere is the same."""

  def found(*names: str, **settings: Any) -> Any:
    return identity(make_config(parents, *(judges / name for name in names), **settings), tmp_path)

  shutil.copytree(judges / 'b', judges / 'b_elsewhere', dirs_exist_ok=True)
  own = found('a', 'b')
  assert own == found('a', 'b') == found('a', 'b_elsewhere')
  others = [found('a'), found('a', 'c'), found('a', 'b', 'c'), found('a', 'b', aggregate='worst')]
  assert all(other != own for other in others)
  for member in ('b', 'c'):
    sha = Run(judges / member).params_sha256
    assert f'sha256:{sha}' in found('a', member)['config']['reward_model']['ensemble']


def test_members_can_be_config_files(parents: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """Each is run first, once; equal files with other arguments are other members."""
  file = tmp_path / 'reward_model.py'
  file.write_text(
    'from tests import tiny\n'
    'def get_config(arg="0"):\n'
    f'  config = tiny.make_config("reward_model", {str(parents)!r}, steps=1, seed=int(arg))\n'
    '  config.objective.normalization = "none"\n'
    '  return config\n'
  )
  config = make_config(parents, parents / 'reward_model')
  config.reward_model = RewardModelInitConfig(init=f'{file}:0', ensemble=(f'{file}:1',))
  with tiny.devices(1):
    stage = stages.resolve(config, tmp_path)
  runs = [stage.parents[role].folder for role in ('reward_model', 'reward_model_1')]
  assert runs[0] != runs[1]
  assert len(list((tmp_path / 'stages').glob('reward_model-*'))) == 2
  parts = parts_of(
    config.with_inits({role: str(run.folder) for role, run in stage.parents.items()})
  )
  with jax.set_mesh(parts.mesh):
    loaded = load_reward_model(parts)
  assert loaded is not None and len(loaded.params) == 2
  first, second = (np.asarray(tree['head']['kernel']) for tree in loaded.params)
  assert not np.array_equal(first, second)
  again = f'{tmp_path}/../{tmp_path.name}/reward_model.py:0'
  config.reward_model = RewardModelInitConfig(init=f'{file}:0', ensemble=(again,))
  with pytest.raises(ConfigError, match=r'reward_model\.ensemble.*the same parameters'):
    identity(config, tmp_path)


LEXICON = 'def count(prompts, responses):\n  return [len(text.split()) for text in responses]\n'


def test_several_rewards_make_one_score(
  parents: pathlib.Path, judges: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """A reward model up to a threshold, a function, and the task as a gate, row by row."""
  file = tmp_path / 'lexicon.py'
  file.write_text(LEXICON)
  parts = parts_of(make_config(parents, judges / 'a'))
  with jax.set_mesh(parts.mesh):
    proxy = scores_by(parts, judges / 'a')
    rows = some_sequences(parts)
    texts = decode_sequences(rows, parts.tokenizer.decode)
    task = parts.feedback.task
    assert task is not None
    gold = task.gold_reward(*texts)
    limit, gate = float(np.median(proxy)), float(np.median(gold))
    rewards = (
      RewardConfig(weight=0.5, clip_above=limit),
      RewardConfig(source='task', weight=2.0, gate_below=gate),
      RewardConfig(source=f'{file}:count', weight=-0.25),
    )
    config = dataclasses.replace(parts.config, rollout=RolloutConfig(rewards=rewards))
    parts = dataclasses.replace(parts, config=config)
    found = make_reward(parts, load_reward_model(parts))(rows)()
  words = np.array([len(text.split()) for text in texts[1]])
  total = 0.5 * np.minimum(proxy, limit) + 2 * gold - 0.25 * words
  expected = np.where(gold < gate, 2 * gold, total)
  np.testing.assert_allclose(found.scores, expected, rtol=1e-4, atol=1e-4)
  assert 0 < (gold < gate).sum() < 8 and (proxy > limit).any()


def test_process_rewards_are_paid_where_they_belong(
  parents: pathlib.Path, judges: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """With no penalty, no discount and values 0, PPO's returns are sums of what is still to come.

  Half of each token's process score is paid at that token, the number of words at the end.
  """
  file = tmp_path / 'lexicon.py'
  file.write_text(LEXICON)
  config = make_config(
    parents,
    judges / 'process',
    seed=1,
    objective=PPOConfig(kl=KLPenaltyConfig(coefficient=0.0), lam=1.0, whiten_advantages=False),
    rollout=RolloutConfig(
      rewards=(RewardConfig(weight=0.5), RewardConfig(source=f'{file}:count', weight=0.1))
    ),
  )
  built: Any = tiny.build_recipe(config)
  with jax.set_mesh(built.mesh):
    state = built.recipe.init()
    prepared = built.recipe.prepare(state, built.recipe.batch(0))
    rows = jax.device_get(prepared.batch.sequences)
    run = Run(judges / 'process')
    params = run.restore_role('reward_model', abstract_reward_model(run.model, built.mesh))
    tokens = np.asarray(roles.token_reward(run.model, params, rows), np.float64)
  mask = rows.response_mask
  rewards = np.where(mask, 0.5 * tokens, 0.0)
  _, responses = decode_sequences(rows, built.tokenizer.decode)
  words = np.array([len(text.split()) for text in responses])
  rewards[np.arange(len(mask)), mask.sum(-1) - 1] += 0.1 * words
  returns = rewards[:, ::-1].cumsum(-1)[:, ::-1]
  np.testing.assert_allclose(
    prepared.batch.returns, np.where(mask, returns, 0), rtol=1e-4, atol=1e-5
  )
  scores = prepared.metrics['score']
  assert float(scores.value()) == pytest.approx(rewards.sum(-1).mean(), rel=1e-4)
  assert np.abs(tokens[mask]).max() > 1e-2 and words.max() > words.min()


def test_a_reward_may_have_a_model_of_its_own(
  judges: pathlib.Path, parents: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """Helpfulness beside safety: two models are weighed, and the second is part of the identity."""

  def config(second: str) -> Any:
    terms = (RewardConfig(), RewardConfig(init=str(judges / second), weight=0.5))
    return make_config(parents, judges / 'a', rollout=RolloutConfig(rewards=terms))

  parts = parts_of(config('b'))
  with jax.set_mesh(parts.mesh):
    found = make_reward(parts, load_reward_model(parts))(some_sequences(parts))().scores
  expected = scores_by(parts, judges / 'a') + 0.5 * scores_by(parts, judges / 'b')
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  assert parts.config.inits()['reward_1'].init == str(judges / 'b')
  with tiny.devices(1):
    one, other = (stages.resolve(config(second), tmp_path).identity for second in 'bc')
  assert one != other
  finished = tiny.run_stage(dataclasses.replace(config('b'), steps=1), tmp_path / 'run')
  again = finished.outcome.run.config
  assert again.rollout.rewards[1].init == str((judges / 'b').absolute())
  policy = config('b')
  policy.rollout.rewards[1].init = str(parents / 'sft')
  with pytest.raises(ConfigError, match=r'rollout\.rewards\[1\]\.init.*reward model'):
    parts_of(policy)


def test_members_must_differ(judges: pathlib.Path, parents: pathlib.Path) -> None:
  """A model twice is no ensemble, and disagrees with itself about nothing."""
  for members in ((judges / 'a', judges / 'a'), (judges / 'a', '')):
    with pytest.raises(ConfigError, match=r'reward_model\.ensemble'):
      make_config(parents, *members, aggregate='uncertainty').validate()


def test_members_and_rewards_must_differ_under_any_names(
  judges: pathlib.Path, parents: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """A copy of a run has its parameters: it is no other judge."""
  copy = judges / 'a_elsewhere'
  shutil.copytree(judges / 'a', copy, dirs_exist_ok=True)
  with pytest.raises(ConfigError, match='the same parameters') as caught:
    identity(make_config(parents, judges / 'a', judges / 'b', copy), tmp_path)
  assert caught.value.field == 'reward_model.ensemble' and repr(str(copy)) in str(caught.value)

  def rewards(*members: str, terms: tuple[RewardConfig, ...]) -> Any:
    folders = [judges / name for name in members]
    return make_config(parents, *folders, rollout=RolloutConfig(rewards=terms))

  own = RewardConfig(init=str(copy), weight=0.5)
  for terms in ((RewardConfig(), own), (RewardConfig(init=str(judges / 'a')), own)):
    with pytest.raises(ConfigError, match='the same parameters') as caught:
      identity(rewards('a', terms=terms), tmp_path)
    assert caught.value.field == 'rollout.rewards[1].init'
  # One reward, and a model that is not asked; and an ensemble beside its first member.
  identity(rewards('a', terms=(own,)), tmp_path)
  identity(rewards('a', 'b', terms=(RewardConfig(), own)), tmp_path)
