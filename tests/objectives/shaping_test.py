"""From scores to rewards: every placement against a slow loop over single rows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.checks import ShapeError
from rlhf_jax.common.types import Experience
from rlhf_jax.objectives.shaping import PLACEMENTS, shape_rewards, token_rewards
from tests import quick
from tests.objectives import batches

RNG = np.random.default_rng(0)
R = 5
LENGTHS = [5, 3, 1, 4]
MASK: Any = np.arange(R) < np.array(LENGTHS)[:, None]
SCORES: Any = RNG.normal(0, 2, 4)
PENALTIES: Any = RNG.normal(0, 0.3, (4, R))

every_placement = pytest.mark.parametrize('placement', PLACEMENTS)


def slow_row(placement: str, length: int, score: float, penalties: np.ndarray) -> tuple[list, list]:
  """Rewards of one row and which of its steps have a value.

  'after_stop' follows the released code of Huang et al. 2024: `sequence_length` is the index of
  the last token, the score goes to the index after it if there is one, else to itself, and values
  are kept up to that index; masked penalties are 0.
  """
  rewards = [float(penalties[t]) if t < length else 0.0 for t in range(R)]
  sequence_length = length - 1
  if placement == 'last_token':
    end, valued = sequence_length, sequence_length
  elif placement == 'after_stop':
    sequence_length_p1 = sequence_length + 1
    end = sequence_length_p1 if sequence_length_p1 < R else sequence_length
    valued = sequence_length_p1
  else:
    end, valued = R - 1, R - 1
  rewards[end] += score
  return rewards, [t <= valued for t in range(R)]


def slow_rewards(placement: str) -> tuple[np.ndarray, np.ndarray]:
  """All rows."""
  rows = [slow_row(placement, *row) for row in zip(LENGTHS, SCORES, PENALTIES, strict=True)]
  rewards, valued = zip(*rows, strict=True)
  return np.array(rewards), np.array(valued)


def shaped(placement: str, penalties: Any = PENALTIES) -> tuple[Any, Any]:
  """The function under test on the rows above."""
  run = quick.jit(lambda scores, penalties: shape_rewards(scores, penalties, MASK, placement))
  result = run(jnp.asarray(SCORES, jnp.float32), jnp.asarray(penalties, jnp.float32))
  assert result.rewards.dtype == jnp.float32
  return np.asarray(result.rewards), np.asarray(result.value_mask)


@every_placement
def test_placement_equals_the_slow_loop(placement: str) -> None:
  """Rewards and value masks of full, ragged and one-token rows."""
  rewards, value_mask = shaped(placement)
  expected, valued = slow_rewards(placement)
  np.testing.assert_allclose(rewards, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(value_mask, valued)


@every_placement
def test_every_response_is_paid_its_score_and_its_penalties_once(placement: str) -> None:
  """A row's rewards sum to score + penalties of its tokens, wherever the score is put."""
  rewards, value_mask = shaped(placement)
  expected = SCORES + np.where(MASK, PENALTIES, 0).sum(1)
  np.testing.assert_allclose(rewards.sum(1), expected, rtol=1e-5)
  np.testing.assert_array_equal(rewards[~value_mask], 0.0)


def test_where_the_score_goes_by_hand() -> None:
  """Of a response of 3 in 5 columns: columns 2, 3 and 4; of a full one always column 4."""
  for placement, column in zip(PLACEMENTS, (2, 3, 4), strict=True):
    rewards, _ = shaped(placement, penalties=np.zeros((4, R)))
    assert np.flatnonzero(rewards[1]).tolist() == [column]
    assert np.flatnonzero(rewards[0]).tolist() == [4]


@every_placement
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_masked_penalties_are_never_read(placement: str, bad: float) -> None:
  """Log-ratios of padding may be anything."""
  dirty = np.where(MASK, PENALTIES, bad)
  jax.tree.map(np.testing.assert_array_equal, shaped(placement, dirty), shaped(placement))


def test_scores_do_not_depend_on_their_row() -> None:
  """Permuting rows permutes rewards: no row is paid another's score."""
  order = np.random.default_rng(0).permutation(4)
  scores, penalties = (jnp.asarray(x, jnp.float32) for x in (SCORES, PENALTIES))
  straight = shape_rewards(scores, penalties, MASK, 'after_stop')
  shuffled = shape_rewards(scores[order], penalties[order], MASK[order], 'after_stop')
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[order], b), straight, shuffled)


@every_placement
def test_what_is_paid_token_by_token_stays_there(placement: str) -> None:
  """Only the rest of a score is put at its place; scores include what tokens are paid."""
  batch = batches.make_batch('rollouts')
  mask = batch.sequences.response_mask
  rng = np.random.default_rng(1)
  paid = rng.normal(0, 1, mask.shape).astype(np.float32)
  scores = jnp.asarray(rng.normal(0, 1, 4), jnp.float32)
  penalties = jnp.zeros(mask.shape)
  experience: Any = Experience(
    sequences=batch.sequences,
    old_logprobs=batch.old_logprobs,
    reference_logprobs=batch.reference_logprobs,
    scores=scores,
    token_rewards=np.where(mask, paid, np.nan),
  )
  rewards = np.asarray(token_rewards(experience, penalties, placement).rewards)
  total = np.where(mask, paid, 0.0).sum(1)
  # A response whose tokens have been paid all of its score has nothing left to be placed.
  np.testing.assert_allclose(rewards.sum(1), scores, rtol=1e-5, atol=1e-6)
  even = token_rewards(experience.replace(scores=total), penalties, placement).rewards
  np.testing.assert_allclose(even, np.where(mask, paid, 0.0), atol=1e-6)
  bare = token_rewards(experience.replace(token_rewards=None), penalties, placement).rewards
  only_scores = shape_rewards(scores, penalties, mask, placement).rewards
  np.testing.assert_array_equal(bare, only_scores)


def test_integer_scores_and_wrong_places_are_refused() -> None:
  """A score of 0.7 as an integer is 0."""
  with pytest.raises(ShapeError, match='scores: expected a floating-point array'):
    shape_rewards(jnp.ones(4, int), jnp.zeros((4, R)), MASK, 'last_token')
  with pytest.raises(ShapeError, match='penalties: expected a floating-point array'):
    shape_rewards(jnp.ones(4), jnp.zeros((4, R), int), MASK, 'last_token')
  with pytest.raises(ShapeError, match='mask: axis B'):
    shape_rewards(jnp.ones(4), jnp.zeros((4, R)), MASK[:3], 'last_token')
  with pytest.raises(ValueError, match="placement 'first': expected one of"):
    shape_rewards(jnp.ones(4), jnp.zeros((4, R)), MASK, 'first')
