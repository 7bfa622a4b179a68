"""The gold reward is the exact posterior of the grammar, and the task is what it promises."""

import math

import numpy as np
import pytest

from rlhf_jax.data import reviews

POLAR = [row for table in reviews.POLAR.values() for row in table]
MIRROR = {row[0]: row[1] for row in POLAR} | {row[1]: row[0] for row in POLAR}


def _by_paths(text: str) -> float:
  """The log-odds of a text, adding up every hidden path with a transition of its own."""
  model = reviews.grammar()
  words = [reviews.VOCABULARY.index(w) if w in reviews.VOCABULARY else -1 for w in text.split()]
  onward = [[np.flatnonzero(row).tolist() for row in table] for table in model.transition]

  def walk(latent: int, state: int, position: int) -> float:
    if position == len(words):
      return 1.0
    return math.fsum(
      model.transition[latent, state, after]
      * model.emission[after, words[position]]
      * walk(latent, after, position + 1)
      for after in onward[latent][state]
    )

  return math.log(walk(reviews.POSITIVE, 0, 0)) - math.log(walk(reviews.NEGATIVE, 0, 0))


@pytest.mark.parametrize(
  'text',
  [
    'good',
    'the food was not very good',
    'we never loved the view but the',
    'superb superb superb superb superb superb',
    'food the was bad not',
    'the zebra was good',
    'overall the staff seemed cold yet i enjoyed',
  ],
)
def test_the_gold_reward_equals_a_sum_over_all_hidden_paths(text):
  assert reviews.gold_reward([text])[0] == pytest.approx(_by_paths(text), abs=1e-10)


def test_an_empty_text_says_nothing():
  assert reviews.gold_reward(['', '  ']).tolist() == [0.0, 0.0]
  assert reviews.gold_reward([]).shape == (0,)


def test_mirrored_texts_have_mirrored_rewards():
  """Swapping every polar word for its opposite negates the log-odds: neither side is stronger."""
  texts = reviews.sample_reviews(200, np.random.default_rng(0))
  mirrored = [' '.join(MIRROR.get(word, word) for word in text.split()) for text in texts]
  np.testing.assert_allclose(reviews.gold_reward(mirrored), -reviews.gold_reward(texts), atol=1e-9)


def test_negation_conjunction_and_order_matter():
  """The reward is no sum over words."""
  good, not_good, not_bad, last_good, last_bad = reviews.gold_reward(
    [
      'the food was good',
      'the food was not good',
      'the food was not bad',
      'the food was bad but the staff was good',
      'the food was good but the staff was bad',
    ]
  )
  assert good > 1 and not_good < -1 and not_bad > 1
  assert last_good > 0.5 and last_bad < -0.5


def test_unknown_words_say_nothing_of_the_sentiment_alone():
  assert reviews.gold_reward(['zebra'])[0] == pytest.approx(0.0, abs=1e-12)


def test_long_texts_have_finite_rewards():
  assert np.isfinite(reviews.gold_reward(['superb ' * 3000, 'zebra ' * 3000])).all()


def test_the_posterior_is_calibrated():
  """Of the reviews that begin with log-odds g, a share sigmoid(g) is positive.

  Reviews are drawn from each sentiment alone; their first four words (none is shorter) are binned.
  """
  model, count = reviews.grammar(), 8000
  belief, log_likelihood = model.start(2 * count)
  log_likelihood[reviews.NEGATIVE, :count] = -np.inf
  log_likelihood[reviews.POSITIVE, count:] = -np.inf
  words, lengths, _ = model.extend(belief, log_likelihood, np.random.default_rng(0), 4)
  assert lengths.min() == 4
  gold = reviews.gold_reward([' '.join(reviews.VOCABULARY[w] for w in row) for row in words])
  share = 1 / (1 + np.exp(-gold))
  positive = np.arange(2 * count) < count
  for low, high in ((0.0, 0.2), (0.2, 0.5), (0.5, 0.7), (0.7, 0.8), (0.8, 1.0)):
    inside = (share >= low) & (share < high)
    assert inside.sum() > 100
    error = 4 * 0.5 / math.sqrt(inside.sum())
    assert abs(positive[inside].mean() - share[inside].mean()) < error


def test_every_review_has_a_clause_and_most_are_short():
  texts = reviews.sample_reviews(4000, np.random.default_rng(0))
  lengths = np.array([len(text.split()) for text in texts])
  assert lengths.min() == 4
  assert 8 < lengths.mean() < 14
  assert (lengths == 64).mean() < 0.002


def test_continuations_end_where_reviews_do():
  """After a whole clause a review may end at once, with probability STOP; within one it cannot."""
  texts = ['the food was good'] * 4000 + ['the food was'] * 4000
  found, finished = reviews.continuations(texts, np.random.default_rng(0), 3)
  empty = np.array([not text for text in found])
  assert abs(empty[:4000].mean() - reviews.STOP) < 0.05
  assert empty[4000:].mean() < 0.02  # only if a word of the three was noise
  assert finished[empty].all()
  assert max(len(text.split()) for text in found) == 3
  assert not finished[:4000][~empty[:4000]].all()


def test_the_soft_value_equals_that_of_continuations_read_from_scratch():
  """V = beta log E exp((gold(final) - gold(x)) / beta), by the public functions in turn."""
  text, beta, draws = 'the food was', 8.0, 6000
  found = reviews.soft_value([text], np.random.default_rng(0), beta=beta, samples=draws)[0]
  rest, _ = reviews.continuations([text] * draws, np.random.default_rng(1), 64)
  gained = reviews.gold_reward([f'{text} {end}' for end in rest]) - reviews.gold_reward([text])
  assert found == pytest.approx(beta * np.log(np.exp(gained / beta).mean()), abs=0.35)
  flat = reviews.soft_value([text], np.random.default_rng(0), beta=1e6, samples=draws)[0]
  assert flat == pytest.approx(gained.mean(), abs=4 * 2 * gained.std() / math.sqrt(draws))
  assert found > flat  # Jensen
