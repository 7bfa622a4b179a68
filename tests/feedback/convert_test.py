"""Converters say of their records what those they are made of said, and no more."""

import itertools
import math
import pathlib
import re

import numpy as np
import pytest

from rlhf_jax.feedback import convert
from rlhf_jax.feedback.convert import CONVERTERS, GROUP
from rlhf_jax.feedback.dataset import KINDS, Split
from rlhf_jax.feedback.records import Comparison, Demonstration, Ranking, Rating, StepRating

PAIRS = (
  Comparison('p', 'a', 'b', annotator='ann'),
  Comparison('q', 'c', 'd', 0.75),
  Comparison('p', 'e', 'f', 0.5),
)
RATINGS = (
  Rating('p', 'a', 1.0, 'ann'),
  Rating('q', 'x', 5.0),
  Rating('p', 'b', 3.0, 'ann'),
  Rating('p', 'c', 1.0, 'bob'),
)
RANKINGS = (
  Ranking('p', ('a', 'b', 'c', 'd'), (2, 1, 2, 2), 'ann'),
  Ranking('q', ('x', 'y'), (1, 2)),
)
STEPS = (StepRating('p', ('a', 'b', 'c'), (0.5, -1.0, 2.0), 'ann'), StepRating('q', ('x',), (1.0,)))
SPLIT = Split(comparisons=PAIRS, ratings=RATINGS, rankings=RANKINGS, step_ratings=STEPS)


@pytest.mark.parametrize('name', CONVERTERS)
def test_the_table_names_kinds_and_what_it_converts_between(name):
  converter = CONVERTERS[name]
  assert {converter.source, converter.target} <= set(KINDS)
  assert name.startswith(f'{converter.source}_to_{converter.target}')
  made = SPLIT.converted(name)
  kept = [kind for kind in KINDS if kind != converter.target]
  assert all(getattr(made, kind) == getattr(SPLIT, kind) for kind in kept)
  assert len(getattr(made, converter.target)) > 0
  assert converter.convert(getattr(SPLIT, converter.source)) == getattr(made, converter.target)
  assert converter.convert(()) == ()


def test_pairs_become_desirable_and_undesirable_responses():
  found = convert.comparisons_to_ratings(PAIRS)
  assert found == (
    Rating('p', 'a', 1.0, 'ann'),
    Rating('p', 'b', -1.0, 'ann'),
    Rating('q', 'c', 0.5),
    Rating('q', 'd', -0.5),
    Rating('p', 'e', 0.0),
    Rating('p', 'f', 0.0),
  )
  assert not any(math.copysign(1, rating.score) < 0 for rating in found[-2:])


def test_pairs_become_rankings_of_two_but_for_ties():
  assert convert.comparisons_to_rankings(PAIRS) == (
    Ranking('p', ('a', 'b'), (1, 2), 'ann'),
    Ranking('q', ('c', 'd'), (1, 2)),
  )


def test_ratings_of_one_prompt_are_compared_and_the_gap_is_the_margin():
  assert convert.ratings_to_comparisons(RATINGS) == (
    Comparison('p', 'b', 'a', margin=2.0, annotator='ann'),
    Comparison('p', 'b', 'c', margin=2.0),
  )
  same = (Rating('p', 'a', 1), Rating('p', ' a', 2))
  assert convert.ratings_to_comparisons(same) == ()


def test_ratings_of_one_prompt_are_ranked_and_repeated_ones_averaged():
  assert convert.ratings_to_rankings(RATINGS) == (Ranking('p', ('a', 'b', 'c'), (2, 1, 2)),)
  again = (Rating('p', 'a', 1), Rating('p', 'b', 2), Rating('p', 'a ', 4), Rating('p', 'c', 2))
  assert convert.ratings_to_rankings(again) == (Ranking('p', ('a', 'b', 'c'), (1, 2, 2)),)
  assert convert.ratings_to_rankings(again[::2]) == ()  # one response
  assert convert.ratings_to_rankings(again[1::2]) == ()  # one score


def test_a_prompt_that_was_rated_often_is_taken_in_groups_of_about_equal_size():
  """The number of pairs grows with that of ratings, and no response is left without a group."""
  count = 3 * GROUP + 1
  ratings = [Rating('p', f'text {row}', row) for row in range(count)]
  rankings = convert.ratings_to_rankings(ratings)
  assert [len(ranking.responses) for ranking in rankings] == [7, 7, 7, 7]
  assert [text for x in rankings for text in x.responses] == [x.response for x in ratings]
  assert len(convert.ratings_to_comparisons(ratings)) == 4 * (7 * 6 // 2)
  assert len(convert.ratings_to_comparisons(ratings[:GROUP])) == GROUP * (GROUP - 1) // 2


@pytest.mark.parametrize('desirable', [1, 5, 9])
def test_of_desirable_and_undesirable_responses_the_desirable_are_imitated(desirable):
  """Whatever their share: a median would keep all of them, or none."""
  ratings = [Rating('p', f'text {row}', 1.0 if row < desirable else -1.0) for row in range(10)]
  assert convert.ratings_to_demonstrations(ratings) == tuple(
    Demonstration('p', f'text {row}') for row in range(desirable)
  )


@pytest.mark.parametrize('score, count', [(0.1, 3), (1 / 3, 10), (1.7463108627625603, 28)])
def test_equal_scores_are_all_no_lower_than_their_mean(score, count):
  """Though rounding may lift the mean above them: of the last, even if the sum is exact."""
  ratings = [Rating('p', f'text {row}', score) for row in range(count)]
  assert len(convert.ratings_to_demonstrations(ratings)) == count


def test_rankings_become_all_pairs_that_were_told_apart():
  assert convert.rankings_to_comparisons(RANKINGS) == (
    Comparison('p', 'b', 'a', annotator='ann'),
    Comparison('p', 'b', 'c', annotator='ann'),
    Comparison('p', 'b', 'd', annotator='ann'),
    Comparison('q', 'x', 'y'),
  )
  whole = Ranking('p', ('a', 'b', 'c'), (3, 1, 2))
  found = {(x.chosen, x.rejected) for x in convert.rankings_to_comparisons([whole])}
  assert found == {('b', 'a'), ('b', 'c'), ('c', 'a')}


def test_standings_sum_to_zero_and_keep_the_order():
  found = convert.rankings_to_ratings(RANKINGS)
  assert [x.score for x in found] == [-1 / 3, 1.0, -1 / 3, -1 / 3, 1.0, -1.0]
  assert {x.annotator for x in found[:4]} == {'ann'}
  for ranks in itertools.product((1, 2, 3), repeat=3):
    if min(ranks) != 1 or max(ranks) == 1:
      continue
    scores = [x.score for x in convert.rankings_to_ratings([Ranking('p', ('a', 'b', 'c'), ranks)])]
    assert sum(scores) == pytest.approx(0) and max(map(abs, scores)) <= 1
    for (one, first), (other, second) in itertools.combinations(zip(ranks, scores, strict=True), 2):
      assert np.sign(other - one) == np.sign(first - second)


def test_the_best_of_a_ranking_is_imitated():
  shared = Ranking('r', ('a', 'b', 'c'), (1, 2, 1))
  assert convert.rankings_to_demonstrations([*RANKINGS, shared]) == (
    Demonstration('p', 'b'),
    Demonstration('q', 'x'),
    Demonstration('r', 'a'),
    Demonstration('r', 'c'),
  )


def test_steps_become_the_response_with_the_worst_or_the_last_score():
  assert convert.step_ratings_to_ratings_min(STEPS) == (
    Rating('p', 'a b c', -1.0, 'ann'),
    Rating('q', 'x', 1.0),
  )
  assert [x.score for x in convert.step_ratings_to_ratings_last(STEPS)] == [2.0, 1.0]


def test_pairs_survive_the_way_through_ratings_and_rankings():
  plain = PAIRS[:1] + (Comparison('q', 'c', 'd'),)
  for way in ('ratings', 'rankings'):
    there = CONVERTERS[f'comparisons_to_{way}'].convert(plain)
    back = CONVERTERS[f'{way}_to_comparisons'].convert(there)
    assert [(x.prompt, x.chosen, x.rejected, x.annotator) for x in back] == [
      (x.prompt, x.chosen, x.rejected, x.annotator) for x in plain
    ]


def test_the_page_on_data_names_every_converter():
  page = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'data.md'
  text = page.read_text('utf-8')
  assert re.findall(r'^\| `(\w+_to_\w+)` \|', text, re.MULTILINE) == list(CONVERTERS)
  assert f'groups of at most {GROUP}' in text
