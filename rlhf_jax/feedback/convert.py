"""From feedback of one kind to feedback of another: pure functions of records, by name.

Records come out in the order in which what they are made of came in. Converters that compare the
ratings of one prompt take them in groups of at most GROUP, in order and of about equal size, so
that what they make of a prompt that was rated a thousand times stays finite.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from rlhf_jax.feedback.dialogues import Context
from rlhf_jax.feedback.records import Comparison, Demonstration, Ranking, Rating, StepRating

# The most responses that are compared with each other; annotators of InstructGPT were shown 4 to 9
# (Ouyang et al. 2022, section 3.5).
GROUP = 9


class Converter(NamedTuple):
  """A way from one kind of records to another.

  Attributes:
    source: the kind it reads.
    target: the kind it gives.
    convert: the records of the one -> the records of the other, which may be none.
    lost: which records nothing comes of, for the message that there are no others.
  """

  source: str
  target: str
  convert: Callable[[Sequence[Any]], tuple[Any, ...]]
  lost: str = ''


def comparisons_to_ratings(records: Sequence[Comparison]) -> tuple[Rating, ...]:
  """Of each pair, chosen with score 2p - 1 and rejected with the opposite; p is the preference.

  A plain label gives 1 and -1, the desirable and the undesirable output that KTO makes of a pair
  (Ethayarajh et al. 2024, section 4); a tie gives 0 twice.
  """
  ratings = []
  for pair in records:
    score = 2 * pair.preference - 1
    ratings.append(Rating(pair.prompt, pair.chosen, score, pair.annotator))
    ratings.append(Rating(pair.prompt, pair.rejected, 0.0 - score, pair.annotator))
  return tuple(ratings)


def comparisons_to_rankings(records: Sequence[Comparison]) -> tuple[Ranking, ...]:
  """Rankings of two, chosen first; ties are left out, and how sure the preference was is lost."""
  return tuple(
    Ranking(pair.prompt, (pair.chosen, pair.rejected), (1, 2), pair.annotator)
    for pair in records
    if pair.preference > 0.5
  )


def ratings_to_comparisons(records: Sequence[Rating]) -> tuple[Comparison, ...]:
  """All pairs of different responses in a group whose scores differ, by how much as the margin.

  Pairs are in the order of their later response, then of their earlier one.
  """
  pairs = []
  for group in _groups(records):
    for later, second in enumerate(group):
      for first in group[:later]:
        if first.score == second.score or first.response.strip() == second.response.strip():
          continue
        high, low = (first, second) if first.score > second.score else (second, first)
        pairs.append(
          Comparison(
            high.prompt,
            high.response,
            low.response,
            margin=high.score - low.score,
            annotator=_annotator((high, low)),
          )
        )
  return tuple(pairs)


def ratings_to_rankings(records: Sequence[Rating]) -> tuple[Ranking, ...]:
  """The responses of a group in the order of their scores, equal scores with equal ranks.

  A response that was rated more than once has its mean score. Groups with one response, or one
  score, say nothing and are left out.
  """
  rankings = []
  for group in _groups(records):
    scores: dict[str, list[float]] = {}
    texts: dict[str, str] = {}
    for rating in group:
      text = texts.setdefault(rating.response.strip(), rating.response)
      scores.setdefault(text, []).append(rating.score)
    means = [math.fsum(found) / len(found) for found in scores.values()]
    if len(set(means)) > 1:
      ranks = tuple(1 + sum(other > mean for other in means) for mean in means)
      rankings.append(Ranking(group[0].prompt, tuple(scores), ranks, _annotator(group)))
  return tuple(rankings)


def ratings_to_demonstrations(records: Sequence[Rating]) -> tuple[Demonstration, ...]:
  """The responses that are scored no lower than the mean of all scores.

  As ReST filters by a threshold on the reward (Gulcehre et al. 2023, section 3), which here is the
  mean: of desirable and undesirable ones it keeps the desirable, whatever their share, as a median
  would not.
  """
  if not records:
    return ()
  scores = [rating.score for rating in records]
  # Rounding may lift the mean of equal scores above them.
  threshold = min(math.fsum(scores) / len(scores), max(scores))
  return tuple(Demonstration(x.prompt, x.response) for x in records if x.score >= threshold)


def rankings_to_comparisons(records: Sequence[Ranking]) -> tuple[Comparison, ...]:
  """All pairs of a ranking whose ranks differ (Ouyang et al. 2022, section 3.5); no margins."""
  pairs = []
  for ranking in records:
    ranked = list(zip(ranking.ranks, ranking.responses, strict=True))
    for high, chosen in ranked:
      for low, rejected in ranked:
        if high < low:
          pairs.append(Comparison(ranking.prompt, chosen, rejected, annotator=ranking.annotator))
  return tuple(pairs)


def rankings_to_ratings(records: Sequence[Ranking]) -> tuple[Rating, ...]:
  """Every response with (how many are worse - how many are better) / (K - 1), in [-1, 1].

  The scores of a ranking sum to 0. It is the response's Borda count, moved and scaled.
  """
  ratings = []
  for ranking in records:
    for rank, response in zip(ranking.ranks, ranking.responses, strict=True):
      standing = sum((other > rank) - (other < rank) for other in ranking.ranks)
      score = standing / (len(ranking.ranks) - 1)
      ratings.append(Rating(ranking.prompt, response, score, ranking.annotator))
  return tuple(ratings)


def rankings_to_demonstrations(records: Sequence[Ranking]) -> tuple[Demonstration, ...]:
  """The responses of rank 1: best-of-K fine-tuning (Dong et al. 2023, RAFT)."""
  return tuple(
    Demonstration(ranking.prompt, response)
    for ranking in records
    for rank, response in zip(ranking.ranks, ranking.responses, strict=True)
    if rank == 1
  )


def step_ratings_to_ratings_min(records: Sequence[StepRating]) -> tuple[Rating, ...]:
  """The response with the score of its worst step (Wang et al. 2024, Math-Shepherd, 3.4)."""
  return tuple(Rating(x.prompt, x.response, min(x.scores), x.annotator) for x in records)


def step_ratings_to_ratings_last(records: Sequence[StepRating]) -> tuple[Rating, ...]:
  """The response with the score of its last step (Snell et al. 2024, section 5.1)."""
  return tuple(Rating(x.prompt, x.response, x.scores[-1], x.annotator) for x in records)


CONVERTERS = {
  'comparisons_to_ratings': Converter('comparisons', 'ratings', comparisons_to_ratings),
  'comparisons_to_rankings': Converter(
    'comparisons', 'rankings', comparisons_to_rankings, 'Ties give none.'
  ),
  'ratings_to_comparisons': Converter(
    'ratings',
    'comparisons',
    ratings_to_comparisons,
    'It takes different responses to one prompt with different scores.',
  ),
  'ratings_to_rankings': Converter(
    'ratings',
    'rankings',
    ratings_to_rankings,
    'It takes different responses to one prompt with different scores.',
  ),
  'ratings_to_demonstrations': Converter('ratings', 'demonstrations', ratings_to_demonstrations),
  'rankings_to_comparisons': Converter('rankings', 'comparisons', rankings_to_comparisons),
  'rankings_to_ratings': Converter('rankings', 'ratings', rankings_to_ratings),
  'rankings_to_demonstrations': Converter('rankings', 'demonstrations', rankings_to_demonstrations),
  'step_ratings_to_ratings_min': Converter('step_ratings', 'ratings', step_ratings_to_ratings_min),
  'step_ratings_to_ratings_last': Converter(
    'step_ratings', 'ratings', step_ratings_to_ratings_last
  ),
}


def _groups(records: Sequence[Rating]) -> list[list[Rating]]:
  """Ratings of one prompt, prompts in the order of their first, in parts of at most GROUP."""
  prompts: dict[Context, list[Rating]] = {}
  for rating in records:
    prompts.setdefault(rating.prompt, []).append(rating)
  groups = []
  for ratings in prompts.values():
    parts = math.ceil(len(ratings) / GROUP)
    bounds = [len(ratings) * part // parts for part in range(parts + 1)]
    groups += [ratings[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
  return groups


def _annotator(records: Iterable[Rating]) -> str:
  """Who said it all; '' where there is no one such."""
  names = {rating.annotator for rating in records}
  return names.pop() if len(names) == 1 else ''
