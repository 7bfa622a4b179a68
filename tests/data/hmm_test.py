"""Exact inference and sampling, against sums over every hidden path."""

import itertools
import math

import numpy as np
import pytest

from rlhf_jax.data.hmm import ClassHMM


def _tiny(seed: int = 0) -> ClassHMM:
  """Two classes, a beginning and three states, two words, and chains that may stop anywhere."""
  rng = np.random.default_rng(seed)
  transition = rng.dirichlet(np.ones(4), size=(2, 4))[..., :3]
  transition = np.concatenate([np.zeros((2, 4, 1)), transition], -1)
  emission = np.concatenate([np.zeros((1, 3)), rng.dirichlet(np.ones(3), size=3)])
  emission[1:, :2] /= emission[1:, :2].sum(-1, keepdims=True)
  return ClassHMM(transition, emission)


def _likelihood(model: ClassHMM, words: list[int], ended: bool) -> np.ndarray:
  """`[C]`: p(words, and the end if `ended` | class), summed over all hidden paths one by one."""
  total = np.zeros(len(model.transition))
  for latent, table in enumerate(model.transition):
    for path in itertools.product(range(1, table.shape[0]), repeat=len(words)):
      product, before = 1.0, 0
      for state, word in zip(path, words, strict=True):
        product *= table[before, state] * model.emission[state, word]
        before = state
      total[latent] += product * ((1 - table[before].sum()) if ended else 1.0)
  return total


@pytest.mark.parametrize('words', [[], [0], [1, 0], [0, 2, 1], [1, 1, 0, 2, 0]])
def test_the_forward_algorithm_sums_over_all_hidden_paths(words):
  model = _tiny()
  _, found = model.read(np.array([words], int), np.array([len(words)]), *model.start(1))
  np.testing.assert_allclose(found[:, 0], np.log(_likelihood(model, words, ended=False)))


def test_reading_in_two_parts_is_reading_at_once():
  model = _tiny()
  words = np.random.default_rng(0).integers(0, 3, size=(5, 7))
  whole = model.read(words, np.full(5, 7), *model.start(5))
  half = model.read(words[:, :3], np.full(5, 3), *model.start(5))
  both = model.read(words[:, 3:], np.full(5, 4), *half)
  for one, other in zip(whole, both, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-12)


def test_rows_do_not_see_their_neighbours_or_what_is_beyond_their_length():
  model = _tiny()
  words = np.random.default_rng(0).integers(0, 3, size=(4, 6))
  lengths = np.array([0, 2, 6, 3])
  _, together = model.read(words, lengths, *model.start(4))
  for row, length in enumerate(lengths):
    alone = model.read(words[row : row + 1, :length], lengths[row : row + 1], *model.start(1))
    np.testing.assert_allclose(alone[1][:, 0], together[:, row])


def test_long_strings_do_not_underflow():
  model = _tiny()
  words = np.random.default_rng(0).integers(0, 2, size=(1, 5000))
  _, found = model.read(words, np.array([5000]), *model.start(1))
  assert np.isfinite(found).all() and (found < -1000).all()


def test_continuations_have_their_exact_conditional_probabilities():
  """Frequencies of every continuation of at most 2 words, against sums over hidden paths."""
  model, prefix, draws, limit = _tiny(), [0, 1], 60_000, 2
  belief, log_likelihood = model.read(np.array([prefix]), np.array([2]), *model.start(1))
  belief, log_likelihood = (np.repeat(x, draws, axis=1) for x in (belief, log_likelihood))
  words, lengths, finished = model.extend(
    belief, log_likelihood, np.random.default_rng(0), max_words=limit
  )
  total = _likelihood(model, prefix, ended=False).sum()
  covered = 0.0
  for length in range(limit + 1):
    for rest in itertools.product(range(2), repeat=length):
      for ended in (True, False) if length == limit else (True,):
        exact = _likelihood(model, [*prefix, *rest], ended).sum() / total
        if length == limit and not ended:  # the string goes on, in whatever way
          exact -= _likelihood(model, [*prefix, *rest], True).sum() / total
        same = (lengths == length) & (words[:, :length] == rest).all(-1) & (finished == ended)
        assert abs(same.mean() - exact) < 4 * math.sqrt(exact * (1 - exact) / draws) + 1e-9
        covered += exact
  assert covered == pytest.approx(1.0)


def test_words_of_probability_zero_are_never_drawn():
  emission = np.array([[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.5]])
  transition = np.array([[[0.0, 1.0], [0.0, 0.5]]])
  words, lengths, _ = ClassHMM(transition, emission).extend(
    *ClassHMM(transition, emission).start(1000), np.random.default_rng(0), max_words=5
  )
  assert lengths.min() == 1
  assert set(words[:, 0]) == {1}
