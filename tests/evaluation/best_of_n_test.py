"""Best-of-n: expectations over subsets, and the KL that choosing costs."""

import itertools

import numpy as np
import pytest

from rlhf_jax.evaluation.best_of_n import best_of_n, best_of_n_kl

PROMPTS, SAMPLES = 3, 6


@pytest.mark.parametrize('n', range(1, SAMPLES + 1))
def test_equals_the_mean_over_all_subsets(n: int) -> None:
  """Each subset's value is that of its member with the highest score."""
  rng = np.random.default_rng(0)
  judge, values = rng.normal(size=(2, PROMPTS, SAMPLES))
  expected = []
  for scores, worth in zip(judge, values, strict=True):
    subsets = [list(subset) for subset in itertools.combinations(range(SAMPLES), n)]
    chosen = [subset[int(np.argmax(scores[subset]))] for subset in subsets]
    expected.append(worth[chosen].mean())
  np.testing.assert_allclose(best_of_n(judge, values, n), expected, rtol=1e-12)


def test_one_is_the_mean_and_all_is_the_maximum() -> None:
  """The best of one is any; the best of all is the judge's favourite."""
  judge = np.array([[0.3, -1.0, 2.0], [5.0, 4.0, 3.0]])
  np.testing.assert_allclose(best_of_n(judge, judge, 1), judge.mean(1))
  np.testing.assert_allclose(best_of_n(judge, judge, 3), judge.max(1))


def test_the_kl_of_choosing() -> None:
  """KL of the distribution of the best of n among many equally likely responses, by summation.

  The response of rank i of N is best with probability (i^n - (i - 1)^n) / N^n, drawn with
  replacement; for N to infinity the KL from the uniform distribution is log n - (n - 1) / n.
  """
  many = 100_000
  for n in (1, 2, 4, 64):
    edges = (np.arange(many + 1) / many) ** n
    chances = np.diff(edges)
    positive = chances[chances > 0]
    kl = float((positive * np.log(positive * many)).sum())
    assert best_of_n_kl(n) == pytest.approx(kl, abs=2e-3)


@pytest.mark.parametrize('n', [0, SAMPLES + 1])
def test_impossible_sizes_are_refused(n: int) -> None:
  """There is no best of none, nor of more than there are."""
  scores = np.zeros((PROMPTS, SAMPLES))
  with pytest.raises(ValueError, match='n='):
    best_of_n(scores, scores, n)
