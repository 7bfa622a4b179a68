"""Hidden Markov models of word strings with a fixed latent class: exact inference and sampling."""

import dataclasses

import numpy as np

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class ClassHMM:
  """Words are emitted along a hidden chain whose transitions depend on a class drawn once a string.

  Classes `C` are equally likely. State 0 is where every string begins; it emits nothing. Row
  `transition[c, k]` sums to the probability of going on; the rest is that of the string's end.

  Attributes:
    transition: `[C, K, K]` float64.
    emission: `[K, V + 1]` float64; column V is a word outside the vocabulary. With every entry
      positive outside row 0, every string of words has a posterior.
  """

  transition: Array
  emission: Array

  @property
  def words(self) -> int:
    """V, the size of the vocabulary; also the number that stands for any word outside it."""
    return self.emission.shape[1] - 1

  def start(self, rows: int) -> tuple[Array, Array]:
    """The belief about `rows` empty strings, to hand to `read` or `extend`."""
    classes, states, _ = self.transition.shape
    belief = np.zeros((classes, rows, states))
    belief[:, :, 0] = 1.0
    return belief, np.zeros((classes, rows))

  def read(
    self, words: Array, lengths: Array, belief: Array, log_likelihood: Array
  ) -> tuple[Array, Array]:
    """The forward algorithm: updates what is believed about strings by more of their words.

    Args:
      words: `[N, T]` integers in [0, V].
      lengths: `[N]`, how many of each row's words are real.
      belief: `[C, N, K]`, p(state | class, words so far).
      log_likelihood: `[C, N]`, log p(words so far | class), in nats.

    Returns:
      The updated belief and log-likelihood (Rabiner 1989, section V.A: scaled at every word, so
      that nothing underflows however long the string).
    """
    belief, log_likelihood = belief.copy(), log_likelihood.copy()
    for t in range(words.shape[1]):
      rows = np.flatnonzero(lengths > t)
      moved = belief[:, rows] @ self.transition
      moved *= self.emission.T[words[rows, t]]
      total = moved.sum(-1)
      belief[:, rows] = moved / total[..., None]
      log_likelihood[:, rows] += np.log(total)
    return belief, log_likelihood

  def extend(
    self, belief: Array, log_likelihood: Array, rng: np.random.Generator, max_words: int
  ) -> tuple[Array, Array, Array]:
    """Draws exact continuations of the strings that the belief is about.

    The class and the present state come from their posterior, the rest of the chain from the model.

    Returns:
      words `[N, max_words]` (V where there is none), lengths `[N]`, finished `[N]` bool: False
      where `max_words` words came before the end.
    """
    classes, rows, states = belief.shape
    posterior = np.exp(log_likelihood - log_likelihood.max(0))[..., None] * belief
    joint = posterior.transpose(1, 0, 2).reshape(rows, classes * states)
    latent, state = np.divmod(_draw(_cumulative(joint), rng), states)
    stop = 1.0 - self.transition.sum(-1, keepdims=True)
    steps = _cumulative(np.concatenate([self.transition, stop.clip(0.0)], -1))
    emissions = _cumulative(self.emission[1:, :-1])

    words = np.full((rows, max_words), self.words)
    lengths = np.full(rows, max_words)
    active = np.arange(rows)
    for t in range(max_words + 1):
      state = _draw(steps[latent, state], rng)
      going = state < states
      lengths[active[~going]] = t
      active, latent, state = active[going], latent[going], state[going]
      if t == max_words or not active.size:
        break
      words[active, t] = _draw(emissions[state - 1], rng)
    finished = np.ones(rows, bool)
    finished[active] = False
    return words, lengths, finished


def _cumulative(weights: Array) -> Array:
  total = weights.cumsum(-1)
  return total / total[..., -1:]


def _draw(cumulative: Array, rng: np.random.Generator) -> Array:
  """One category a row; a category of probability 0 is never drawn."""
  return (rng.random((len(cumulative), 1)) >= cumulative).sum(-1)
