"""The embedded task's feedback: reproducible, well formed, and as noisy as it says."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from rlhf_jax.data import embedded, reviews
from rlhf_jax.data.config import ReviewsConfig
from rlhf_jax.feedback.labelling import LabelConfig

WORDS = 16


def _config(**changes: Any) -> ReviewsConfig:
  return dataclasses.replace(
    ReviewsConfig(demonstrations=800, comparisons=800, prompts=200), **changes
  )


def _make(held_out: float, **changes: Any) -> Any:
  return embedded.make(_config(**changes), held_out, WORDS)


@pytest.fixture(scope='module')
def made():
  return _make(1.0)


def test_equal_arguments_give_equal_feedback_and_another_seed_another(made):
  assert _make(1.0).fingerprint == made.fingerprint
  assert _make(1.0, seed=1).fingerprint != made.fingerprint


def test_more_of_one_kind_leaves_the_others_as_they_are(made):
  other = _make(1.0, comparisons=7)
  assert other.train.demonstrations == made.train.demonstrations
  assert other.train.prompts == made.train.prompts


@pytest.mark.parametrize('held_out, sizes', [(0.0, (0, 0)), (0.1, (20, 80)), (50.0, (50, 50))])
def test_held_out_records_are_a_share_or_a_count_and_come_on_top(held_out, sizes):
  made = _make(held_out)
  assert (len(made.held_out.prompts), len(made.held_out.comparisons)) == sizes
  assert (len(made.train.prompts), len(made.train.comparisons)) == (200, 800)
  assert (made.bayes_accuracy is None) == (held_out == 0)


def test_prompts_are_two_to_four_words_and_never_a_whole_review(made):
  lengths = {len(prompt.text.split()) for prompt in made.train.prompts}
  assert lengths == {2, 3, 4}


def test_responses_have_one_to_max_words_and_pairs_differ(made):
  lengths = [
    len(text.split()) for pair in made.train.comparisons for text in (pair.chosen, pair.rejected)
  ]
  assert min(lengths) >= 1 and max(lengths) == WORDS
  assert np.mean(np.array(lengths) < WORDS) > 0.8  # most reviews end before the limit
  assert all(pair.chosen != pair.rejected for pair in made.train.comparisons)


def test_the_generator_leaves_room_for_alignment(made):
  """Demonstrations are balanced, spread over a few nats, and far below what a review can reach."""
  gold = made.task.gold_reward(
    [x.prompt for x in made.train.demonstrations], [x.response for x in made.train.demonstrations]
  )
  assert abs(gold.mean()) < 4 * gold.std() / np.sqrt(len(gold))
  assert 2.0 < gold.std() < 4.0
  assert made.task.gold_reward(['we loved'], ['the food and i loved the view'])[0] > 4.0


def test_default_labels_are_noisy_but_worth_learning_from():
  made = _make(4000.0, comparisons=10, demonstrations=1)
  assert 0.85 < made.bayes_accuracy < 0.92


def test_the_gold_order_attains_the_bayes_accuracy():
  """Within 4 standard errors; responses of equal reward (to rounding) count half."""
  labels = LabelConfig(temperature=1.0, flip_rate=0.1)
  made = _make(3000.0, demonstrations=1, labels=labels)
  pairs = made.held_out.comparisons
  prompts = [pair.prompt for pair in pairs]
  chosen = made.task.gold_reward(prompts, [pair.chosen for pair in pairs])
  rejected = made.task.gold_reward(prompts, [pair.rejected for pair in pairs])
  right = (1 + np.sign((chosen - rejected).round(9))) / 2
  assert right.mean() == pytest.approx(made.bayes_accuracy, abs=4 * 0.5 / np.sqrt(len(pairs)))


def test_regret_labels_order_finished_responses_by_reward():
  labels = LabelConfig(model='regret', temperature=0.0, regret_samples=2)
  made = _make(0.0, demonstrations=1, comparisons=500, labels=labels)
  finished = [
    pair
    for pair in made.train.comparisons
    if max(len(text.split()) for text in (pair.chosen, pair.rejected)) < WORDS
  ]
  prompts = [pair.prompt for pair in finished]
  chosen = made.task.gold_reward(prompts, [pair.chosen for pair in finished])
  rejected = made.task.gold_reward(prompts, [pair.rejected for pair in finished])
  assert len(finished) > 300 and (chosen - rejected > -1e-9).all()


def test_a_lower_temperature_and_fewer_flips_raise_the_bayes_accuracy():
  found = [
    _make(500.0, labels=LabelConfig(temperature=temperature)).bayes_accuracy
    for temperature in (2.0, 0.5, 0.0)
  ]
  assert found[0] < found[1] < found[2]
  assert found[2] > 0.93  # all but pairs that differ in words that say nothing
  flipped = _make(500.0, labels=LabelConfig(temperature=0, flip_rate=0.2))
  assert flipped.bayes_accuracy - 0.5 == pytest.approx(0.6 * (found[2] - 0.5))


def test_annotators_are_named():
  labels = LabelConfig(annotators=3, annotator_spread=0.5)
  made = _make(0.0, comparisons=100, labels=labels)
  assert {pair.annotator for pair in made.train.comparisons} == {
    'annotator-0',
    'annotator-1',
    'annotator-2',
  }


def test_regret_adds_the_value_of_what_is_unfinished_and_nothing_else():
  prompts, responses = ['the food', 'the food'], ['was good', 'was good but']
  finished, rng = np.array([True, False]), np.random.default_rng
  plain = embedded.preference_scores(prompts, responses, finished, LabelConfig(), rng(0))
  config = LabelConfig(model='regret', regret_beta=0.5, regret_samples=16)
  regret = embedded.preference_scores(prompts, responses, finished, config, rng(0))
  value = reviews.soft_value(['the food was good but'], rng(0), beta=0.5, samples=16)
  np.testing.assert_allclose(regret - plain, [0.0, value[0]])


def test_the_task_rewards_prompt_and_response_together():
  task = embedded.ReviewsTask()
  found = task.gold_reward(['the food was not'], ['good'])
  assert found == reviews.gold_reward(['the food was not good'])
  assert set(task.vocabulary()) == set(reviews.VOCABULARY)
