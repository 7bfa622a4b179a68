"""Several responses to each prompt, who samples them, and what objectives make of the groups."""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.models import roles
from rlhf_jax.objectives.best_of_n import BestOfNConfig
from rlhf_jax.objectives.kl_penalty import KLPenaltyConfig
from rlhf_jax.objectives.online_dpo import OnlineDPOConfig
from rlhf_jax.objectives.reinforce import ReinforceConfig
from rlhf_jax.objectives.rloo import RLOOConfig
from rlhf_jax.recipes import Built, online
from tests import tiny

pytestmark = pytest.mark.slow

SAMPLES = 4


class Scored(NamedTuple):
  """What a rollout sampled, on the host, and its scores."""

  sequences: Any
  scores: np.ndarray


class Stage(NamedTuple):
  """A stage, its initial state, and all that its rollouts sampled and scored."""

  built: Built
  state: Any
  seen: list[Scored]


@pytest.fixture
def make_stage(monkeypatch: pytest.MonkeyPatch, parents: pathlib.Path) -> Any:
  """`make_stage(case, objective)`: a stage whose reward is watched."""
  seen: list[Scored] = []
  real = online.make_reward

  def make_reward(*arguments: Any, **options: Any) -> Any:
    ask = real(*arguments, **options)

    def watched(sequences: Any) -> Any:
      scored = ask(sequences)()
      seen.append(Scored(jax.device_get(sequences), np.asarray(scored.scores)))
      return lambda: scored

    return watched

  monkeypatch.setattr(online, 'make_reward', make_reward)

  def make(case: str, objective: Any, **changes: Any) -> Stage:
    built = tiny.build_recipe(tiny.make_config(case, parents, objective=objective, **changes))
    with jax.set_mesh(built.mesh):
      return Stage(built, built.recipe.init(), seen)

  return make


def prepare(stage: Stage, step: int = 0, state: Any = None, prompts: Any = None) -> Any:
  """What a step trains on."""
  recipe, state = stage.built.recipe, stage.state if state is None else state
  state = dataclasses.replace(state, step=state.step * 0 + step)
  with jax.set_mesh(stage.built.mesh):
    return recipe.prepare(state, recipe.batch(step) if prompts is None else prompts)


def elsewhere(state: Any) -> Any:
  """The state with quite other parameters."""
  rng = np.random.default_rng(0)
  move = lambda x: x + rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
  return dataclasses.replace(state, params=jax.tree.map(move, state.params))


def test_samples_of_a_prompt_are_adjacent_and_differ(make_stage: Any) -> None:
  """Each prompt stands `samples` times in a row; its responses are drawn one by one.

  So are those of a prompt that is there twice, as in a batch that straddles two epochs; the same
  step again draws the same, the next one others.
  """
  stage = make_stage('rloo', RLOOConfig(samples=SAMPLES))
  prompts = stage.built.recipe.batch(0)
  first = prepare(stage).batch.sequences
  np.testing.assert_array_equal(first.prompt, np.repeat(prompts.tokens, SAMPLES, axis=0))
  np.testing.assert_array_equal(first.prompt_mask, np.repeat(prompts.mask, SAMPLES, axis=0))
  np.testing.assert_array_equal(prepare(stage).batch.sequences.response, first.response)
  assert not np.array_equal(
    prepare(stage, 1, prompts=prompts).batch.sequences.response, first.response
  )

  same = jax.tree.map(lambda x: np.repeat(x[:1], len(x), axis=0), prompts)
  rows = np.asarray(prepare(stage, prompts=same).batch.sequences.response)
  groups = rows.reshape(tiny.ROWS, SAMPLES, -1)
  assert len({row.tobytes() for row in rows}) > 0.8 * len(rows)
  assert len({group.tobytes() for group in groups}) == tiny.ROWS
  assert all(len({row.tobytes() for row in group}) > 1 for group in groups)
  # No column of the groups is like another: the k-th samples are no common random numbers.
  columns = [groups[:, k].tobytes() for k in range(SAMPLES)]
  assert len(set(columns)) == SAMPLES


def test_the_best_are_imitated_with_who_sampled_them(make_stage: Any) -> None:
  """Of each prompt's samples from the frozen reference the `keep` best, wherever the policy is."""
  keep = 2
  stage = make_stage('best_of_n', BestOfNConfig(samples=SAMPLES, keep=keep))
  prepared, moved = prepare(stage), prepare(stage, state=elsewhere(stage.state))
  sequences, scores = stage.seen[0]
  kept = np.argsort(-scores.reshape(-1, SAMPLES), axis=1, kind='stable')[:, :keep]
  rows = (kept + SAMPLES * np.arange(tiny.ROWS)[:, None]).reshape(-1)
  for name in ('prompt', 'response', 'response_mask'):
    expected = getattr(sequences, name)[rows]
    np.testing.assert_array_equal(getattr(prepared.batch, name), expected)
    np.testing.assert_array_equal(getattr(moved.batch, name), expected)
  found = metrics_lib.values(prepared.metrics)
  assert found['kept_score'] == pytest.approx(scores[rows].mean(), rel=1e-5)
  assert found['score'] == pytest.approx(scores.mean(), rel=1e-5, abs=1e-6)
  assert found['kept_score'] > found['score']
  # The samples' own KL is 0 wherever the policy is: it is not shown as the policy's.
  assert 'kl' not in found and 'kl_k3' not in found


def test_expert_iteration_samples_from_the_policy(make_stage: Any) -> None:
  stage = make_stage('best_of_n', BestOfNConfig(samples=SAMPLES, sample_from='policy'))
  prepared, moved = prepare(stage), prepare(stage, state=elsewhere(stage.state))
  assert not np.array_equal(prepared.batch.response, moved.batch.response)
  # They are far from the reference, and the sampler's log-probs are those of the moved policy.
  found = metrics_lib.values(moved.metrics)
  assert found['kl'] > 0.1 and found['sampler_logprob_error'] < 1e-4


def test_pairs_of_online_dpo_are_best_and_worst(make_stage: Any) -> None:
  """Chosen by the reward of this iteration; the reference's log-probs are of those responses."""
  stage = make_stage('online_dpo', OnlineDPOConfig(samples=3))
  pairs = prepare(stage, state=elsewhere(stage.state)).batch
  sequences, scores = stage.seen[0]
  groups = scores.reshape(-1, 3)
  rows = np.stack([groups.argmax(1), groups.argmin(1)], 1) + 3 * np.arange(tiny.ROWS)[:, None]
  np.testing.assert_array_equal(pairs.sequences.response, sequences.response[rows])
  for side in range(2):
    np.testing.assert_array_equal(pairs.sequences.prompt[:, 0], sequences.prompt[rows[:, side]])
  np.testing.assert_allclose(pairs.margin, groups.max(1) - groups.min(1), rtol=1e-5)
  assert (np.asarray(pairs.margin) > 0).sum() >= tiny.ROWS - 1
  with jax.set_mesh(stage.built.mesh):
    reference = stage.built.recipe.init().params['policy']
    for side in range(2):
      half = jax.tree.map(lambda x, side=side: x[rows[:, side]], sequences)
      output = roles.policy_output(stage.built.model, reference, half, temperature=1.0)
      expected = np.where(half.response_mask, output.logprobs, 0)
      np.testing.assert_allclose(pairs.reference_logprobs[:, side], expected, atol=1e-5)


def test_the_running_baseline_is_of_the_iterations_before(make_stage: Any) -> None:
  """b <- decay b + (1 - decay) mean reward, from the first iteration's mean, by the carry alone."""
  config = ReinforceConfig(baseline_decay=0.75, kl=KLPenaltyConfig(coefficient=0.0))
  stage = make_stage('reinforce', config)
  state, baseline = stage.state, None
  for step in range(4):
    prepared = prepare(stage, step, state)
    scores = stage.seen[step].scores
    mean = scores.mean()
    baseline = mean if baseline is None else baseline
    mask = np.asarray(prepared.batch.sequences.response_mask)
    expected = np.where(mask, (scores - baseline)[:, None], 0)
    np.testing.assert_allclose(prepared.batch.advantages, expected, rtol=1e-4, atol=1e-5)
    found = metrics_lib.values(prepared.metrics)
    assert found['baseline'] == pytest.approx(baseline, rel=1e-4, abs=1e-5)
    baseline = 0.75 * baseline + 0.25 * mean
    assert float(prepared.carry['baseline']) == pytest.approx(baseline, rel=1e-4, abs=1e-5)
    state = dataclasses.replace(state, carry=prepared.carry)


def test_two_prompts_are_enough_for_four_updates(make_stage: Any) -> None:
  """What must divide into minibatches and microbatches are the responses, not the prompts."""
  stage = make_stage('rloo', RLOOConfig(samples=8, minibatches=4), batch_size=2, accumulation=2)
  prepared = prepare(stage)
  assert prepared.batch.advantages.shape[0] == 16
  with jax.set_mesh(stage.built.mesh):
    state, _ = stage.built.recipe.update(stage.state, prepared.batch)
  counts = [
    int(x)
    for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
    if getattr(path[-1], 'name', '') == 'count'
  ]
  assert counts and set(counts) == {4}
