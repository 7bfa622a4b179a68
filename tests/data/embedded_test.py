"""The embedded task's feedback: reproducible, well formed, and as noisy as it says."""

import dataclasses
import hashlib
import json
import math
from typing import Any

import numpy as np
import pytest

from rlhf_jax.data import embedded, reviews
from rlhf_jax.data.config import ReviewsConfig
from rlhf_jax.feedback.convert import CONVERTERS
from rlhf_jax.feedback.labelling import LabelConfig

WORDS = 16
FROZEN = '400a9ad16fa632f313a074d9b73fd9b6471b83811caccd9c83b046ece9c456d5'


def _config(**changes: Any) -> ReviewsConfig:
  return dataclasses.replace(
    ReviewsConfig(
      demonstrations=800,
      comparisons=800,
      prompts=200,
      ratings=600,
      rankings=500,
      step_ratings=150,
    ),
    **changes,
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
  other = _make(1.0, comparisons=7, ratings=3)
  assert other.train.demonstrations == made.train.demonstrations
  assert other.train.prompts == made.train.prompts
  for kind in ('rankings', 'step_ratings'):
    assert tuple(getattr(other.train, kind)) == tuple(getattr(made.train, kind))


def test_the_first_three_kinds_are_what_they_were_before_the_others_came():
  """SHA-256 of the records as JSON, frozen when there were three kinds only."""
  config = ReviewsConfig(demonstrations=40, comparisons=40, prompts=40)
  made = embedded.make(config, 4.0, 12)
  records = [
    record.to_dict()
    for split in (made.train, made.held_out)
    for kind in (split.prompts, split.demonstrations, split.comparisons)
    for record in kind
  ]
  assert hashlib.sha256(json.dumps(records).encode()).hexdigest() == FROZEN


def test_the_later_kinds_are_made_when_they_are_read(monkeypatch):
  """A stage that learns from comparisons does not pay for rankings; the fingerprint knows them."""
  made, again, noisier = _make(5.0), _make(5.0), _make(5.0, rating_noise=1.0)

  def refuse(*arguments: Any) -> None:
    raise AssertionError('records were made')

  with monkeypatch.context() as patch:
    patch.setattr(reviews, 'sample_reviews', refuse)
    assert made.train.sizes['ratings'] == 600 and made.held_out.sizes['rankings'] == 5
    assert made.fingerprint == again.fingerprint != noisier.fingerprint
    assert len(list(made.train.texts())) == 200 + 2 * 800 + 3 * 800
    with pytest.raises(AssertionError):
      made.require('train', 'ratings')
  for kind in ('ratings', 'rankings', 'step_ratings'):
    for side in ('train', 'held_out'):
      assert made.require(side, kind) == again.require(side, kind)
    assert made.require('train', kind)[:5] != made.require('held_out', kind)


def test_the_config_may_change_before_the_records_are_read():
  config = _config()
  made = embedded.make(config, 0.0, WORDS)
  config.rating_noise, config.labels.temperature = 9.0, 9.0
  again = embedded.make(_config(), 0.0, WORDS)
  assert made.require('train', 'ratings') == again.require('train', 'ratings')
  assert made.require('train', 'rankings') == again.require('train', 'rankings')


def test_nothing_is_held_out_of_any_kind_where_nothing_shall_be():
  made = _make(0.0)
  assert made.held_out.sizes == {}
  assert [tuple(x) for x in (made.held_out.ratings, made.held_out.rankings)] == [(), ()]
  assert tuple(made.held_out.step_ratings) == ()


def _gold(made: Any, records: Any) -> np.ndarray:
  return made.task.gold_reward([x.prompt for x in records], [x.response for x in records])


@pytest.mark.parametrize('noise', [0.0, 0.6, 3.0])
def test_ratings_are_gold_rewards_with_gaussian_noise(noise):
  """Mean and standard deviation of the noise, each within 4 standard errors."""
  made = _make(0.0, ratings=4000, rating_noise=noise)
  ratings = made.require('train', 'ratings')
  error = np.array([x.score for x in ratings]) - _gold(made, ratings)
  assert abs(error.mean()) <= 4 * noise / np.sqrt(len(error)) + 1e-12
  assert abs(error.std() - noise) <= 4 * noise / np.sqrt(2 * len(error)) + 1e-12


def test_two_ratings_order_a_pair_about_as_reliably_as_a_comparison(made):
  """The default noise is chosen so that Phi(gap / (sqrt(2) noise)) is about sigmoid(gap / T).

  Over the gaps of the comparisons that the task makes; either is P(the better one is said to be).
  """
  gaps = []
  for pair in made.train.comparisons:
    first, second = made.task.gold_reward([pair.prompt] * 2, [pair.chosen, pair.rejected])
    gaps.append(abs(first - second))
  by_rating = [0.5 + 0.5 * math.erf(gap / 2 / ReviewsConfig().rating_noise) for gap in gaps]
  by_label = [1 / (1 + math.exp(-gap / LabelConfig().temperature)) for gap in gaps]
  assert np.mean(by_rating) == pytest.approx(np.mean(by_label), abs=0.01)


@pytest.mark.parametrize('size', [2, 5])
def test_rankings_have_as_many_different_responses_as_asked_for(size):
  labels = LabelConfig(annotators=2, annotator_spread=0.1)
  rankings = _make(0.0, ranking_size=size, labels=labels).require('train', 'rankings')
  assert len(rankings) == 500
  for ranking in rankings:
    assert len(set(ranking.responses)) == size
    assert sorted(ranking.ranks) == list(range(1, size + 1))
  assert {x.annotator for x in rankings} == {'annotator-0', 'annotator-1'}
  # The order in which responses were drawn says nothing about their ranks.
  first = np.mean([x.ranks[0] for x in rankings])
  assert abs(first - (size + 1) / 2) < 4 * np.sqrt((size**2 - 1) / 12 / len(rankings))


def test_rankings_of_short_responses_still_differ():
  made = embedded.make(_config(ranking_size=8, rankings=20), 0.0, 1)
  assert all(len(set(x.responses)) == 8 for x in made.require('train', 'rankings'))


def _ranked_gold(made: Any) -> np.ndarray:
  """`[N, K]` gold rewards, the best rank first."""
  rows = []
  for ranking in made.require('train', 'rankings'):
    ordered = [text for _, text in sorted(zip(ranking.ranks, ranking.responses, strict=True))]
    rows.append(made.task.gold_reward([ranking.prompt] * len(ordered), ordered))
  return np.array(rows)


def test_rankings_without_noise_are_ordered_by_gold_reward():
  gold = _ranked_gold(_make(0.0, labels=LabelConfig(temperature=0.0)))
  assert (np.diff(gold, axis=1) < 1e-9).all()


def test_rankings_choose_their_best_as_plackett_luce_at_the_labels_temperature():
  """P(a response of the highest reward comes first) is its softmax, within 4 standard errors."""
  gold = _ranked_gold(_make(0.0, rankings=2000, labels=LabelConfig(temperature=2.0)))
  weights = np.exp((gold - gold.max(1, keepdims=True)) / 2.0)
  highest = gold >= gold.max(1, keepdims=True) - 1e-9  # more than one where words say nothing
  expected = (weights * highest).sum(1) / weights.sum(1)
  found = highest[:, 0]
  assert abs(found.mean() - expected.mean()) < 4 * 0.5 / np.sqrt(len(gold))


def test_an_annotator_is_as_careful_in_rankings_as_in_comparisons():
  """The same population does both: who orders pairs by gold more often ranks by it more often."""
  labels = LabelConfig(annotators=4, annotator_spread=2.0)
  made = _make(0.0, comparisons=2000, rankings=2000, ranking_size=2, labels=labels)
  ranked = CONVERTERS['rankings_to_comparisons'].convert(made.train.rankings)
  shares = []
  for pairs in (made.train.comparisons, ranked):
    prompts = [x.prompt for x in pairs]
    chosen = made.task.gold_reward(prompts, [x.chosen for x in pairs])
    rejected = made.task.gold_reward(prompts, [x.rejected for x in pairs])
    names = np.array([x.annotator for x in pairs])
    shares.append([(chosen > rejected)[names == f'annotator-{i}'].mean() for i in range(4)])
  assert np.ptp(shares[0]) > 0.15  # else the next line says nothing
  assert shares[1] == pytest.approx(shares[0], abs=4 * 0.5 * np.sqrt(2 / 500))


def test_steps_are_words_whose_scores_sum_to_what_the_response_gained(made):
  ratings = made.require('train', 'step_ratings')
  prompts, responses = [x.prompt for x in ratings], [x.response for x in ratings]
  gained = made.task.gold_reward(prompts, responses) - reviews.gold_reward(prompts)
  np.testing.assert_allclose([sum(x.scores) for x in ratings], gained, atol=1e-9)
  for rating in ratings:
    assert rating.steps == tuple(rating.response.split())


def test_a_step_is_worth_the_reward_of_its_prefix_less_that_of_the_one_before(made):
  for rating in made.require('train', 'step_ratings')[:20]:
    text, before = rating.prompt, reviews.gold_reward([rating.prompt])[0]
    for word, score in zip(rating.steps, rating.scores, strict=True):
      text = f'{text} {word}'
      after = reviews.gold_reward([text])[0]
      assert score == pytest.approx(after - before, abs=1e-9)
      before = after


@pytest.mark.parametrize('held_out, sizes', [(0.0, (0, 0)), (0.1, (20, 80)), (50.0, (50, 50))])
def test_held_out_records_are_a_share_or_a_count_and_come_on_top(held_out, sizes):
  made = _make(held_out)
  assert (len(made.held_out.prompts), len(made.held_out.comparisons)) == sizes
  assert (len(made.train.prompts), len(made.train.comparisons)) == (200, 800)
  assert (made.bayes_accuracy() is None) == (held_out == 0)


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
  assert 0.85 < made.bayes_accuracy() < 0.92


def test_the_gold_order_attains_the_bayes_accuracy():
  """Within 4 standard errors; responses of equal reward (to rounding) count half."""
  labels = LabelConfig(temperature=1.0, flip_rate=0.1)
  made = _make(3000.0, demonstrations=1, labels=labels)
  pairs = made.held_out.comparisons
  prompts = [pair.prompt for pair in pairs]
  chosen = made.task.gold_reward(prompts, [pair.chosen for pair in pairs])
  rejected = made.task.gold_reward(prompts, [pair.rejected for pair in pairs])
  right = (1 + np.sign((chosen - rejected).round(9))) / 2
  assert right.mean() == pytest.approx(made.bayes_accuracy(), abs=4 * 0.5 / np.sqrt(len(pairs)))


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
    _make(500.0, labels=LabelConfig(temperature=temperature)).bayes_accuracy()
    for temperature in (2.0, 0.5, 0.0)
  ]
  assert found[0] < found[1] < found[2]
  assert found[2] > 0.93  # all but pairs that differ in words that say nothing
  flipped = _make(500.0, labels=LabelConfig(temperature=0, flip_rate=0.2))
  assert flipped.bayes_accuracy() - 0.5 == pytest.approx(0.6 * (found[2] - 0.5))


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
