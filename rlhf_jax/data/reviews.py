"""The embedded task: reviews from a small probabilistic grammar whose sentiment is known exactly.

A review has a latent sentiment. Each of its clauses ('the soup was not very good', 'we loved the
view') has a polarity, which leans towards the sentiment, most of all after a 'but'; and a 'but'
mostly answers a clause at odds with it. A negation turns the adjective or verb that follows. So the
reward is no sum over words: negations, conjunctions and the order of clauses matter.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.data.hmm import ClassHMM

Array = np.ndarray

# P(a clause has the review's polarity): the first one, one after 'and', one after 'but'.
LEAN = {'first': 0.9, 'and': 0.9, 'but': 0.95}
# P('but' follows) a clause that has the review's polarity, and one that has not.
BUT = {True: 0.12, False: 0.5}
# P(a review ends after a clause).
STOP = 0.5
# P(a word is drawn from the whole vocabulary, whatever the state).
NOISE = 0.01

# The words of a state that speaks of neither side, all equally likely.
NEUTRAL = {
  'opener': 'overall honestly frankly truly',
  'determiner': 'the this our their',
  'noun': 'food service room staff place menu music soup view coffee garden bar',
  'copula': 'was seemed felt looked',
  'negation': 'not never',
  'negator': 'never',
  'intensifier': 'very really so quite',
  'pronoun': 'i we they',
  'and': 'and also plus',
  'but': 'but yet though',
}
# (positive, negative, weight where it speaks the state's mind, weight where it does not): mirrored,
# so that neither sentiment has stronger words.
POLAR = {
  'adjective': (
    ('superb', 'awful', 0.7, 0.01),
    ('great', 'terrible', 1.0, 0.04),
    ('good', 'bad', 1.5, 0.15),
    ('clean', 'dirty', 0.8, 0.1),
    ('tasty', 'bland', 0.8, 0.12),
    ('warm', 'cold', 0.7, 0.2),
    ('quick', 'slow', 0.7, 0.2),
    ('cheap', 'pricey', 0.6, 0.3),
  ),
  'verb': (
    ('loved', 'hated', 1.0, 0.02),
    ('enjoyed', 'disliked', 1.0, 0.08),
    ('liked', 'avoided', 1.0, 0.15),
  ),
}


class State(NamedTuple):
  """A place in a clause: the class of its words, whether a negation turns them, what may follow."""

  words: str
  negated: bool
  successors: dict[str, float]


CLAUSE = {'determiner': 0.65, 'pronoun': 0.35}
OPENING = {'opener': 0.25, 'determiner': 0.5, 'pronoun': 0.25}
END = 'end'  # of a clause: the review stops, or a conjunction leads to the next clause
STATES = {
  'opener': State('opener', False, CLAUSE),
  'and': State('and', False, CLAUSE),
  'but': State('but', False, CLAUSE),
  'determiner': State('determiner', False, {'noun': 1.0}),
  'noun': State('noun', False, {'copula': 1.0}),
  'copula': State('copula', False, {'adjective': 0.65, 'intensifier': 0.28, 'negation': 0.07}),
  'intensifier': State('intensifier', False, {'adjective': 1.0}),
  'adjective': State('adjective', False, {END: 1.0}),
  'negation': State('negation', False, {'turned_adjective': 0.8, 'turned_intensifier': 0.2}),
  'turned_intensifier': State('intensifier', False, {'turned_adjective': 1.0}),
  'turned_adjective': State('adjective', True, {END: 1.0}),
  'pronoun': State('pronoun', False, {'verb': 0.95, 'negator': 0.05}),
  'verb': State('verb', False, {'object_determiner': 1.0}),
  'negator': State('negator', False, {'turned_verb': 1.0}),
  'turned_verb': State('verb', True, {'object_determiner': 1.0}),
  'object_determiner': State('determiner', False, {'object': 1.0}),
  'object': State('noun', False, {END: 1.0}),
}
NEGATIVE, POSITIVE = 0, 1
# Draws of `soft_value` that are held in memory at once.
_ROWS = 1 << 14


def _vocabulary() -> tuple[str, ...]:
  words = [word for text in NEUTRAL.values() for word in text.split()]
  words += [word for table in POLAR.values() for row in table for word in row[:2]]
  return tuple(dict.fromkeys(words))


VOCABULARY = _vocabulary()
_NUMBER = {word: number for number, word in enumerate(VOCABULARY)}


def _state(name: str, polarity: int) -> int:
  return 1 + polarity * len(STATES) + list(STATES).index(name)


def _emission(state: State, polarity: int) -> Array:
  weights = np.zeros(len(VOCABULARY) + 1)
  if state.words in NEUTRAL:
    for word in NEUTRAL[state.words].split():
      weights[_NUMBER[word]] = 1.0
  else:
    aligned = polarity != state.negated
    for positive, negative, own, other in POLAR[state.words]:
      weights[_NUMBER[positive]] = own if aligned else other
      weights[_NUMBER[negative]] = other if aligned else own
  return (1 - NOISE) * weights / weights.sum() + NOISE / len(VOCABULARY)


def _leaning(place: str, agrees: bool) -> float:
  return LEAN[place] if agrees else 1 - LEAN[place]


def _transition(sentiment: int) -> Array:
  size = 1 + 2 * len(STATES)
  table = np.zeros((size, size))
  for polarity in (NEGATIVE, POSITIVE):
    agrees = polarity == sentiment
    for name, probability in OPENING.items():
      table[0, _state(name, polarity)] = probability * _leaning('first', agrees)
    for name, state in STATES.items():
      row = table[_state(name, polarity)]
      for successor, probability in state.successors.items():
        if successor != END:
          row[_state(successor, polarity)] = probability
          continue
        for conjunction, chosen in (('but', BUT[agrees]), ('and', 1 - BUT[agrees])):
          for following in (NEGATIVE, POSITIVE):
            leaning = _leaning(conjunction, following == sentiment)
            onward = probability * (1 - STOP) * chosen * leaning
            row[_state(conjunction, following)] = onward
  return table


def grammar() -> ClassHMM:
  """The grammar as a hidden Markov model: classes negative, positive; states (place, polarity)."""
  emissions = [np.zeros(len(VOCABULARY) + 1)]
  emissions += [
    _emission(state, polarity) for polarity in (NEGATIVE, POSITIVE) for state in STATES.values()
  ]
  return ClassHMM(np.stack([_transition(NEGATIVE), _transition(POSITIVE)]), np.stack(emissions))


_GRAMMAR = grammar()


def _numbers(texts: Iterable[str]) -> tuple[Array, Array]:
  rows = [[_NUMBER.get(word, len(VOCABULARY)) for word in text.split()] for text in texts]
  lengths = np.array([len(row) for row in rows], np.int64)
  words = np.full((len(rows), max(lengths, default=0)), len(VOCABULARY))
  for row, numbers in zip(words, rows, strict=True):
    row[: len(numbers)] = numbers
  return words, lengths


def _texts(words: Array, lengths: Array) -> list[str]:
  table = np.array(VOCABULARY + ('',), object)
  return [
    ' '.join(row[:length]) for row, length in zip(table[words].tolist(), lengths, strict=True)
  ]


def _read(texts: Sequence[str]) -> tuple[Array, Array]:
  return _GRAMMAR.read(*_numbers(texts), *_GRAMMAR.start(len(texts)))


def gold_reward(texts: Sequence[str]) -> Array:
  """`[N]` float64: log P(positive | words) - log P(negative | words), in nats, equal priors.

  Exact: the forward algorithm sums over all ways the grammar could have begun a review with these
  words. An empty text has 0; a word outside the vocabulary can only be noise.
  """
  _, log_likelihood = _read(texts)
  return log_likelihood[POSITIVE] - log_likelihood[NEGATIVE]


def continuations(
  texts: Sequence[str], rng: np.random.Generator, max_words: int
) -> tuple[list[str], Array]:
  """Exact draws of how each review goes on, and `[N]` bool: whether it ended within `max_words`.

  A continuation is empty where the review ends at once.
  """
  words, lengths, finished = _GRAMMAR.extend(*_read(texts), rng, max_words)
  return _texts(words, lengths), finished


def sample_reviews(count: int, rng: np.random.Generator, max_words: int = 64) -> list[str]:
  """Draws reviews; those longer than `max_words` (one in thousands at 64) are cut."""
  return continuations([''] * count, rng, max_words)[0]


def soft_value(
  texts: Sequence[str],
  rng: np.random.Generator,
  *,
  beta: float,
  samples: int,
  max_words: int = 64,
) -> Array:
  """`[N]` float64: V(x) = beta log E exp((gold(final) - gold(x)) / beta), for unfinished reviews.

  The expectation is over how the grammar finishes each, by `samples` exact draws: the optimal value
  of the task that pays the change of the gold reward and charges beta nats of KL to the grammar.
  Below a beta of about 3 it grows with `max_words` without end, as one more good clause is then
  worth more than it costs; at 4 it is 2 nats for 'the food was good but', with a standard error of
  about 5 / sqrt(samples).
  """
  rows = max(1, _ROWS // samples)
  values = [np.zeros(0)]
  for first in range(0, len(texts), rows):
    read = _read(texts[first : first + rows])
    belief, log_likelihood = (np.repeat(x, samples, axis=1) for x in read)
    words, lengths, _ = _GRAMMAR.extend(belief, log_likelihood, rng, max_words)
    _, final = _GRAMMAR.read(words, lengths, belief, log_likelihood)
    gained = (final - log_likelihood)[POSITIVE] - (final - log_likelihood)[NEGATIVE]
    scaled = gained.reshape(-1, samples) / beta
    peak = scaled.max(-1, keepdims=True)
    values.append(beta * (peak[:, 0] + np.log(np.exp(scaled - peak).mean(-1))))
  return np.concatenate(values)
