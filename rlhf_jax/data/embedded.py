"""Feedback on the embedded reviews task: exact samples, labelled by simulated annotators."""

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from rlhf_jax.data import reviews
from rlhf_jax.data.config import ReviewsConfig
from rlhf_jax.feedback.dataset import Deferred, Feedback, Split
from rlhf_jax.feedback.labelling import LabelConfig, label, population, rank
from rlhf_jax.feedback.records import (
  Comparison,
  Demonstration,
  Prompt,
  Ranking,
  Rating,
  StepRating,
)

Array = np.ndarray
R = TypeVar('R')

# The words of a prompt: the first few of a review, and never all of it.
PROMPT_WORDS = (2, 4)


class ReviewsTask:
  """Write the rest of a review; the reward is the log-odds that the whole is positive, in nats."""

  name = 'embedded:reviews'

  def gold_reward(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
    """`[N]` float64, exact (`reviews.gold_reward` of prompt and response together)."""
    return reviews.gold_reward([f'{x} {y}' for x, y in zip(prompts, responses, strict=True)])

  def vocabulary(self) -> Sequence[str]:
    """The words of the grammar."""
    return reviews.VOCABULARY


def make(config: ReviewsConfig, held_out: float, max_words: int) -> Feedback:
  """Makes the feedback; a function of the arguments alone.

  Every kind of record and either side has random numbers of its own, so that more records of one
  kind leave the others as they are. Held-out records are fresh draws: their prompts, being short,
  may be among the training prompts too. Ratings, rankings and step ratings are made when they are
  first read, as most stages need at most one of them.

  Args:
    config: how many records, and how they are labelled.
    held_out: as in `DataConfig`; the records are made on top of those to learn from.
    max_words: the longest response; longer ones are cut there and are unfinished.
  """
  temperatures = population(config.labels, np.random.default_rng([config.seed, 0]))
  splits = []
  probability = np.zeros(0)
  for side in (1, 2):
    counts = (
      config.prompts,
      config.demonstrations,
      config.comparisons,
      config.ratings,
      config.rankings,
      config.step_ratings,
    )
    sizes = [
      size if side == 1 else int(held_out) if held_out >= 1 else round(held_out * size)
      for size in counts
    ]
    rngs = [np.random.default_rng([config.seed, side, kind]) for kind in range(3)]
    prompts = tuple(map(Prompt, sample_prompts(sizes[0], rngs[0])))
    demonstrations = _demonstrations(sizes[1], rngs[1], max_words)
    comparisons, probability = _comparisons(
      sizes[2], rngs[2], max_words, config.labels, temperatures
    )
    splits.append(
      Split(
        prompts,
        demonstrations,
        comparisons,
        _deferred(_ratings, sizes[3], config, max_words, (side, 3)),
        _deferred(_rankings, sizes[4], config, max_words, (side, 4)),
        _deferred(_step_ratings, sizes[5], config, max_words, (side, 5)),
      )
    )
  return Feedback(
    source=ReviewsTask.name,
    train=splits[0],
    held_out=splits[1],
    task=ReviewsTask(),
    label_probability=probability,
  )


def sample_prompts(count: int, rng: np.random.Generator) -> list[str]:
  """The first 2 to 4 words of sampled reviews; the review always goes on."""
  low, high = PROMPT_WORDS
  texts = [text.split() for text in reviews.sample_reviews(count, rng, high + 1)]
  lengths = rng.integers(low, high + 1, size=count)
  return [
    ' '.join(words[: min(length, len(words) - 1)])
    for words, length in zip(texts, lengths, strict=True)
  ]


def _respond(
  prompts: Sequence[str], rng: np.random.Generator, max_words: int
) -> tuple[list[str], Array]:
  """Continuations that are not empty, and whether they are finished."""
  texts, finished = reviews.continuations(prompts, rng, max_words)
  while empty := [row for row, text in enumerate(texts) if not text]:
    again, ended = reviews.continuations([prompts[row] for row in empty], rng, max_words)
    for row, text in zip(empty, again, strict=True):
      texts[row] = text
    finished[empty] = ended
  return texts, finished


def _demonstrations(
  count: int, rng: np.random.Generator, max_words: int
) -> tuple[Demonstration, ...]:
  prompts = sample_prompts(count, rng)
  return tuple(map(Demonstration, prompts, _respond(prompts, rng, max_words)[0]))


def _comparisons(
  count: int,
  rng: np.random.Generator,
  max_words: int,
  config: LabelConfig,
  temperatures: Array,
) -> tuple[tuple[Comparison, ...], Array]:
  """Comparisons, and the probability of each label."""
  prompts = sample_prompts(count, rng)
  first, first_finished = _respond(prompts, rng, max_words)
  second, second_finished = _respond(prompts, rng, max_words)
  while same := [row for row in range(count) if first[row] == second[row]]:
    again, finished = _respond([prompts[row] for row in same], rng, max_words)
    for row, text in zip(same, again, strict=True):
      second[row] = text
    second_finished[same] = finished
  scores = np.stack(
    [
      preference_scores(prompts, first, first_finished, config, rng),
      preference_scores(prompts, second, second_finished, config, rng),
    ],
    axis=1,
  )
  labels = label(scores, temperatures, config.flip_rate, rng)
  comparisons = []
  for row, prompt in enumerate(prompts):
    pair = (first[row], second[row]) if labels.first[row] else (second[row], first[row])
    comparisons.append(Comparison(prompt, *pair, annotator=f'annotator-{labels.annotator[row]}'))
  return tuple(comparisons), labels.probability


def _deferred(
  make: Callable[[int, np.random.Generator, int, ReviewsConfig], tuple[R, ...]],
  size: int,
  config: ReviewsConfig,
  max_words: int,
  stream: tuple[int, int],
) -> Deferred[R]:
  origin = json.dumps([ReviewsTask.name, dataclasses.asdict(config), size, max_words, *stream])
  config = copy.deepcopy(config)  # whoever holds it may change it before the records are read

  def records() -> tuple[R, ...]:
    return make(size, np.random.default_rng([config.seed, *stream]), max_words, config)

  return Deferred(size, records, origin)


def _ratings(
  count: int, rng: np.random.Generator, max_words: int, config: ReviewsConfig
) -> tuple[Rating, ...]:
  prompts = sample_prompts(count, rng)
  responses, _ = _respond(prompts, rng, max_words)
  gold = ReviewsTask().gold_reward(prompts, responses)
  scores = gold + config.rating_noise * rng.standard_normal(count)
  return tuple(map(Rating, prompts, responses, scores.tolist()))


def _rankings(
  count: int, rng: np.random.Generator, max_words: int, config: ReviewsConfig
) -> tuple[Ranking, ...]:
  """Rankings of different responses, by the scores and the annotators of the comparisons."""
  temperatures = population(config.labels, np.random.default_rng([config.seed, 0]))
  prompts = sample_prompts(count, rng)
  responses: list[list[str]] = [[] for _ in prompts]
  columns = []
  for _ in range(config.ranking_size):
    texts, finished = _respond(prompts, rng, max_words)
    while same := [row for row, text in enumerate(texts) if text in responses[row]]:
      again, ended = _respond([prompts[row] for row in same], rng, max_words)
      for row, text in zip(same, again, strict=True):
        texts[row] = text
      finished[same] = ended
    for drawn, text in zip(responses, texts, strict=True):
      drawn.append(text)
    columns.append(preference_scores(prompts, texts, finished, config.labels, rng))
  orders = rank(np.stack(columns, axis=1), temperatures, config.labels.flip_rate, rng)
  return tuple(
    Ranking(prompt, tuple(row), tuple(ranks), f'annotator-{annotator}')
    for prompt, row, ranks, annotator in zip(
      prompts, responses, orders.rank.tolist(), orders.annotator, strict=True
    )
  )


def _step_ratings(
  count: int, rng: np.random.Generator, max_words: int, config: ReviewsConfig
) -> tuple[StepRating, ...]:
  """Words as steps, each with the change that it makes to the gold reward; no noise."""
  del config
  prompts = sample_prompts(count, rng)
  words = [text.split() for text in _respond(prompts, rng, max_words)[0]]
  prefixes = [
    ' '.join([prompt, *row[:length]])
    for prompt, row in zip(prompts, words, strict=True)
    for length in range(len(row) + 1)
  ]
  gold = reviews.gold_reward(prefixes)
  starts = np.cumsum([0] + [len(row) + 1 for row in words])
  return tuple(
    StepRating(prompt, tuple(row), tuple(np.diff(gold[start : start + len(row) + 1]).tolist()))
    for prompt, row, start in zip(prompts, words, starts, strict=False)
  )


def preference_scores(
  prompts: Sequence[str],
  responses: Sequence[str],
  finished: Array,
  config: LabelConfig,
  rng: np.random.Generator,
) -> Array:
  """`[N]` float64: what annotators compare, in nats.

  Bradley-Terry: gold(xy). Regret: gold(xy) - gold(x) + V(xy) - V(x), the soft-optimal advantages
  of the words summed (Knox et al. 2022, eq. 3; Hejna et al. 2024, eq. 4), V 0 at a finished review.
  Responses that are compared have the same x, so gold(x) and V(x) cancel and are left out.
  """
  texts = [f'{x} {y}' for x, y in zip(prompts, responses, strict=True)]
  scores = reviews.gold_reward(texts)
  cut = np.flatnonzero(~finished)
  if config.model == 'regret' and cut.size:
    scores[cut] += reviews.soft_value(
      [texts[row] for row in cut], rng, beta=config.regret_beta, samples=config.regret_samples
    )
  return scores
