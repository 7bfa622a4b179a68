"""Rewards that are Python functions: used, part of a run's identity, and refused when broken."""

import dataclasses
import pathlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax import stages
from rlhf_jax.common.errors import UserError
from rlhf_jax.config import EvaluationConfig, InitConfig
from rlhf_jax.evaluation.policy import decode_sequences
from rlhf_jax.models import roles
from rlhf_jax.objectives.kl_penalty import KLPenaltyConfig
from rlhf_jax.objectives.ppo import PPOConfig
from rlhf_jax.objectives.rloo import RLOOConfig
from rlhf_jax.recipes import rewards
from rlhf_jax.recipes.parts import Parts, load_parts
from rlhf_jax.recipes.rewards import load_function, make_text_score, reward_fingerprints
from rlhf_jax.rollout.config import RewardConfig, RolloutConfig
from rlhf_jax.runs import Run
from tests import tiny

LEXICON = """
WEIGHT = {weight}

def score(prompts, responses):
  assert len(prompts) == len(responses)
  pairs = zip(prompts, responses)
  return [WEIGHT * len(text.split()) - 0.1 * len(prompt) for prompt, text in pairs]
"""


@pytest.fixture
def lexicon(tmp_path: pathlib.Path) -> pathlib.Path:
  file = tmp_path / 'lexicon.py'
  file.write_text(LEXICON.format(weight=1))
  return file


def make_config(case: str, source: str, parents: pathlib.Path, **changes: Any) -> Any:
  """A stage without a reward model, whose only reward is the function."""
  rollout = RolloutConfig(rewards=(RewardConfig(source=source),))
  config = tiny.make_config(case, parents, rollout=rollout, **changes)
  config.reward_model.init = None
  return config


def first_rollout(config: Any) -> tuple[Any, np.ndarray]:
  """The batch of the first update, and what the function says of its responses."""
  built: Any = tiny.build_recipe(config)
  with jax.set_mesh(built.mesh):
    prepared = built.recipe.prepare(built.recipe.init(), built.recipe.batch(0))
  texts = decode_sequences(jax.device_get(prepared.batch.sequences), built.tokenizer.decode)
  scores = [len(text.split()) - 0.1 * len(prompt) for prompt, text in zip(*texts, strict=True)]
  return prepared.batch, np.array(scores)


@pytest.mark.slow
def test_ppo_is_paid_by_a_function(lexicon: pathlib.Path, parents: pathlib.Path) -> None:
  """Without penalty, discount and values, every return is the function's number, to the digit."""
  objective = PPOConfig(kl=KLPenaltyConfig(coefficient=0.0), lam=1.0, whiten_advantages=False)
  config = make_config('ppo', f'{lexicon}:score', parents, objective=objective)
  batch, scores = first_rollout(config)
  mask = np.asarray(batch.sequences.response_mask)
  np.testing.assert_allclose(
    batch.returns, np.where(mask, scores[:, None], 0), rtol=1e-5, atol=1e-5
  )


@pytest.mark.slow
def test_a_function_keeps_no_model_waiting(
  lexicon: pathlib.Path, parents: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Policy, reference, values and reward model read the samples while the function is at work.

  It is asked before the reward model, and waits for what these say when they have read.
  """
  names = ('policy and values', 'reference', 'reward model')
  read = {name: threading.Event() for name in names}

  def said(real: Any, name_of: Callable[[Any], str]) -> Any:
    def watched(*arguments: Any, **options: Any) -> Any:
      found = real(*arguments, **options)
      event = read[name_of(found)]
      jax.debug.callback(lambda _: event.set(), jax.tree.leaves(found)[0])
      return found

    return watched

  def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    del prompts
    waited = [name for name, event in read.items() if not event.wait(timeout=20)]
    assert not waited, f'before {waited}'
    return [0.0] * len(responses)

  policy = said(roles.policy_output, lambda found: names[found.values is None])
  monkeypatch.setattr(roles, 'policy_output', policy)
  monkeypatch.setattr(roles, 'reward_score', said(roles.reward_score, lambda _: 'reward model'))
  monkeypatch.setattr(rewards, 'load_function', lambda source: score)
  config = tiny.make_config('ppo', parents)
  config.rollout.rewards = (RewardConfig(source=f'{lexicon}:score'), RewardConfig())
  built: Any = tiny.build_recipe(config)
  with jax.set_mesh(built.mesh):
    built.recipe.prepare(built.recipe.init(), built.recipe.batch(0))


@pytest.mark.slow
def test_rloo_is_paid_by_a_function(lexicon: pathlib.Path, parents: pathlib.Path) -> None:
  """Advantages are each response's number less the mean of those of the prompt's others."""
  objective = RLOOConfig(samples=4, kl=KLPenaltyConfig(coefficient=0.0))
  config = make_config('rloo', f'{lexicon}:score', parents, objective=objective)
  batch, scores = first_rollout(config)
  groups = scores.reshape(-1, 4)
  expected = np.stack([groups[:, k] - np.delete(groups, k, 1).mean(1) for k in range(4)], 1)
  mask = np.asarray(batch.sequences.response_mask)
  np.testing.assert_allclose(
    batch.advantages, np.where(mask, expected.reshape(-1, 1), 0), rtol=1e-4, atol=1e-4
  )
  assert len(set(scores)) > 4


def test_evaluations_measure_what_is_paid(lexicon: pathlib.Path, parents: pathlib.Path) -> None:
  """The function of each answer, and what never having stopped costs; no proxy without a model."""
  evaluation = EvaluationConfig(prompts=12, batch_size=tiny.ROWS)
  config = make_config('rloo', f'{lexicon}:score', parents, evaluation=evaluation)
  config.rollout = dataclasses.replace(
    config.rollout, missing_stop='replace', missing_stop_value=-7.0
  )
  built = tiny.build_recipe(config)
  with jax.set_mesh(built.mesh):
    found = built.recipe.evaluate(built.recipe.init().params, 0)
  answers = zip(found.arrays['prompt'], found.arrays['response'], strict=True)
  scores = [len(text.split()) - 0.1 * len(prompt) for prompt, text in answers]
  finished = found.arrays['finished']
  assert 0 < finished.sum() < 12
  np.testing.assert_allclose(found.arrays['reward'], np.where(finished, scores, -7.0), rtol=1e-6)
  assert found.scalars['reward'] == pytest.approx(found.arrays['reward'].mean())
  assert 'proxy_reward' not in found.arrays


@pytest.mark.parametrize('weight', [1.0, 2.0])
def test_the_reward_model_alone_is_the_proxy(weight: float, parents: pathlib.Path) -> None:
  """It is not measured twice; with a weight what is paid is another number."""
  rollout = RolloutConfig(rewards=(RewardConfig(weight=weight),))
  evaluation = EvaluationConfig(prompts=tiny.ROWS, batch_size=tiny.ROWS)
  built = tiny.build_recipe(
    tiny.make_config('rloo', parents, rollout=rollout, evaluation=evaluation)
  )
  with jax.set_mesh(built.mesh):
    arrays = built.recipe.evaluate(built.recipe.init().params, 0).arrays
  assert ('reward' in arrays) == (weight != 1.0)
  if weight != 1.0:
    np.testing.assert_allclose(arrays['reward'], weight * arrays['proxy_reward'], rtol=1e-5)


@pytest.mark.parametrize('weight', [1.0, 2.0])
def test_the_task_alone_is_the_gold_reward(weight: float, parents: pathlib.Path) -> None:
  """It is not asked twice; with a weight what is paid is another number."""
  evaluation = EvaluationConfig(prompts=tiny.ROWS, batch_size=tiny.ROWS)
  config = make_config('rloo', 'task', parents, evaluation=evaluation)
  config.rollout.rewards = (RewardConfig(source='task', weight=weight),)
  built = tiny.build_recipe(config)
  with jax.set_mesh(built.mesh):
    arrays = built.recipe.evaluate(built.recipe.init().params, 0).arrays
  assert ('reward' in arrays) == (weight != 1.0)
  if weight != 1.0:
    np.testing.assert_allclose(arrays['reward'], weight * arrays['gold_reward'], rtol=1e-5)


def test_another_function_is_another_run(
  lexicon: pathlib.Path, parents: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """The SHA-256 of the file is in the identity; the same text again is the same run."""
  config = make_config('rloo', f'{lexicon}:score', parents)

  def identity() -> dict[str, Any]:
    with tiny.devices(1):
      return stages.resolve(config, tmp_path).identity

  first = identity()
  (sha,) = first['rewards'].values()
  assert len(sha) == 64
  lexicon.write_text(LEXICON.format(weight=2))
  second = identity()
  assert second != first and {**second, 'rewards': 0} == {**first, 'rewards': 0}
  lexicon.write_text(LEXICON.format(weight=1))
  assert identity() == first


def test_a_function_is_that_of_the_file_as_it_is(lexicon: pathlib.Path) -> None:
  """However fast it changes, and though its size does not; nothing is left beside it."""
  for weight in (1, 2, 3, 4):
    lexicon.write_text(LEXICON.format(weight=weight))
    assert load_function(f'{lexicon}:score')([''], ['a b']) == [2 * weight]
  assert [path.name for path in lexicon.parent.iterdir()] == [lexicon.name]


def test_only_functions_have_fingerprints(lexicon: pathlib.Path) -> None:
  sources = ('reward_model', 'task', f'{lexicon}:score')
  config = RolloutConfig(rewards=tuple(RewardConfig(source=source) for source in sources))
  assert list(reward_fingerprints(config)) == [str(lexicon)]


def test_what_a_function_reads_counts_too(lexicon: pathlib.Path) -> None:
  """A lexicon beside the code: other words, other fingerprints; a missing one is named."""
  words = lexicon.with_name('words.txt')
  term = RewardConfig(source=f'{lexicon}:score', files=(str(words),))
  found = []
  for content in ('good', 'bad'):
    words.write_text(content)
    found.append(reward_fingerprints(RolloutConfig(rewards=(term,))))
  assert found[0].keys() == {str(lexicon), str(words)}
  assert found[0][str(lexicon)] == found[1][str(lexicon)]
  assert found[0][str(words)] != found[1][str(words)]
  words.unlink()
  with pytest.raises(UserError, match='words.txt'):
    reward_fingerprints(RolloutConfig(rewards=(term,)))


def test_a_file_may_hold_whatever_a_module_may(lexicon: pathlib.Path) -> None:
  """Dataclasses with postponed annotations look their module up by its name."""
  lexicon.write_text(
    'from __future__ import annotations\nimport dataclasses\n\n'
    '@dataclasses.dataclass\nclass Words:\n  worth: int = 2\n\n'
    'def score(prompts, responses):\n  return [Words().worth for _ in responses]\n'
  )
  assert load_function(f'{lexicon}:score')([''], ['a']) == [2]


@pytest.mark.slow
def test_a_functions_own_error_says_where_it_arose(
  lexicon: pathlib.Path, parents: pathlib.Path
) -> None:
  """File and line, the error and its text, without a traceback."""
  lexicon.write_text('def score(prompts, responses):\n  return [1 / 0 for _ in responses]\n')
  with pytest.raises(UserError, match=r'lexicon.py:2: ZeroDivisionError'):
    first_rollout(make_config('rloo', f'{lexicon}:score', parents))


BROKEN = {
  'import': ('import no_such_module\n', 'score', 'lexicon.py:1: ModuleNotFoundError'),
  'arithmetic': ('x = 1\ny = x / 0\n', 'score', 'lexicon.py:2: ZeroDivisionError'),
  'no file': (None, 'score', 'there is no file'),
  'no function': ('x = 1\n', 'score', 'defines no function score'),
  'no function but a number': ('score = 1\n', 'score', 'defines no function score'),
  'syntax': ('x = 1\ndef score(:\n', 'score', 'lexicon.py:2: '),
}


@pytest.mark.parametrize('mistake', BROKEN)
def test_a_function_that_is_not_there_is_named_before_anything_runs(
  mistake: str, tmp_path: pathlib.Path, parents: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Also before the stages that this one starts from, which may take hours."""
  text, name, words = BROKEN[mistake]
  file = tmp_path / 'lexicon.py'
  if text is not None:
    file.write_text(text)
  start = tmp_path / 'sft.py'
  start.write_text('from tests import tiny\ndef get_config(): return tiny.make_config("sft")\n')
  config = make_config('rloo', f'{file}:{name}', parents)
  config.policy = InitConfig(init=str(start))
  monkeypatch.setattr(stages, 'train', lambda *arguments: pytest.fail('a stage was trained'))
  with tiny.devices(1), pytest.raises(UserError, match=words) as caught:
    stages.run_stage(config, tmp_path / 'run', root=tmp_path)
  assert str(file) in str(caught.value)
  assert not (tmp_path / 'run').exists() and not (tmp_path / 'stages').exists()


@pytest.fixture(scope='module')
def parts(parents: pathlib.Path) -> Parts:
  config = tiny.make_config('rloo', parents)
  runs = {role: Run(init) for role, (init, _) in config.inits().items()}
  with tiny.devices(1):
    return load_parts(config, runs, tiny.feedback_of(config.data.response_length))


def sequences(parts: Parts) -> Any:
  """Three responses."""
  from rlhf_jax.data import pipeline

  records = parts.feedback.train.demonstrations
  columns = pipeline.encode_demonstrations(records, parts.tokenizer, parts.config.data)
  return columns.take(np.arange(3))


@pytest.mark.parametrize(
  'given',
  [[1, 2, 3], [0.5, -1.0, 1e-3], (True, False, True), np.arange(3, dtype=np.float64)],
  ids=['ints', 'floats', 'bools', 'array'],
)
def test_any_numbers_will_do(given: Any, parts: Parts) -> None:
  """They become float32, without being cut to integers on the way."""
  scored = make_text_score(parts, lambda prompts, responses: given, 'f')(sequences(parts))()
  assert scored.scores.dtype == np.float32 and scored.token_rewards is None
  np.testing.assert_array_equal(scored.scores, np.array(given, np.float32))


@pytest.mark.parametrize(
  ('given', 'words'),
  [
    ([1.0, 2.0], r'list of 3 numbers.*shape \(2,\)'),
    (1.0, r'shape \(\)'),
    ([[1.0], [2.0], [3.0]], r'shape \(3, 1\)'),
    ([[1.0], [2.0, 3.0], []], r'list of 3 numbers.*\[\[1.0\]'),
    (['a', 'b', 'c'], 'type <U1'),
    ([None, 1.0, 2.0], 'type object'),
    (None, 'type object'),
    ([1.0, float('nan'), 2.0], 'nan for the response'),
    ([1.0, 2.0, float('-inf')], '-inf for the response'),
    ([1.0, 2.0, 1e39], 'expected a finite number'),
  ],
)
def test_what_is_not_a_number_a_response_is_refused(given: Any, words: str, parts: Parts) -> None:
  """By the name of the function, what it gave, and for which response."""
  answer = make_text_score(parts, lambda prompts, responses: given, 'a.py:f')(sequences(parts))
  with pytest.raises(UserError, match=f'^a.py:f: .*{words}'):
    answer()
