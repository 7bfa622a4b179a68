"""From scores to rewards: every placement against a slow loop over single rows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.checks import ShapeError
from rlhf_jax.common.types import Sequences
from rlhf_jax.objectives.ppo import PPOConfig
from rlhf_jax.rollout.shaping import handle_missing_stop, shape_rewards, truncate_for_scoring
from tests import quick

RNG = np.random.default_rng(0)
R = 5
LENGTHS = [5, 3, 1, 4]
MASK: Any = np.arange(R) < np.array(LENGTHS)[:, None]
SCORES: Any = RNG.normal(0, 2, 4)
PENALTIES: Any = RNG.normal(0, 0.3, (4, R))

PLACEMENTS = ('last_token', 'after_stop', 'last_position')
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


def shaped(placement: str, penalties: Any = PENALTIES, **settings: Any) -> tuple[Any, Any]:
  """The function under test on the rows above."""
  config = PPOConfig(score_placement=placement, **settings)
  run = quick.jit(lambda scores, penalties: shape_rewards(scores, penalties, MASK, config))
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
def test_whitened_rewards_keep_their_mean(placement: str) -> None:
  """Unit variance (biased) over the steps that have a value; the others stay 0."""
  rewards, valued = slow_rewards(placement)
  kept = rewards[valued]
  expected = (kept - kept.mean()) / np.sqrt(kept.var() + 1e-8) + kept.mean()
  whitened, value_mask = shaped(placement, whiten_rewards=True)
  np.testing.assert_allclose(whitened[value_mask], expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(whitened[~value_mask], 0.0)


@every_placement
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_masked_penalties_are_never_read(placement: str, bad: float) -> None:
  """Log-ratios of padding may be anything."""
  dirty = np.where(MASK, PENALTIES, bad)
  for settings in ({}, {'whiten_rewards': True}):
    for actual, expected in zip(
      shaped(placement, dirty, **settings), shaped(placement, **settings), strict=True
    ):
      np.testing.assert_array_equal(actual, expected)


def test_integer_scores_are_refused() -> None:
  """A score of 0.7 as an integer is 0."""
  config = PPOConfig()
  with pytest.raises(ShapeError, match='scores: expected a floating-point array'):
    handle_missing_stop(jnp.ones(4, int), jnp.ones(4, bool), config)
  with pytest.raises(ShapeError, match='scores: expected a floating-point array'):
    shape_rewards(jnp.ones(4, int), jnp.zeros((4, R)), MASK, config)
  with pytest.raises(ShapeError, match='penalties: expected a floating-point array'):
    shape_rewards(jnp.ones(4), jnp.zeros((4, R), int), MASK, config)
  with pytest.raises(ShapeError, match='mask: axis B'):
    shape_rewards(jnp.ones(4), jnp.zeros((4, R)), MASK[:3], config)


@pytest.mark.parametrize(
  ('option', 'value', 'expected'),
  [
    ('none', -1.0, [2.5, -0.5, 0.25]),
    ('replace', -1.0, [2.5, -1.0, -1.0]),  # Huang et al. 2024: a score of -1 instead
    ('subtract', 1.0, [2.5, -1.5, -0.75]),  # TRL: missing_eos_penalty off the score
  ],
)
def test_missing_stops(option: str, value: float, expected: list[float]) -> None:
  """What becomes of the scores of responses that never stopped; the others keep theirs."""
  config = PPOConfig(missing_stop=option, missing_stop_value=value)
  scores = handle_missing_stop(
    jnp.array([2.5, -0.5, 0.25]), jnp.array([True, False, False]), config
  )
  assert scores.dtype == jnp.float32
  np.testing.assert_allclose(scores, expected)


def make_sequences(response: list[list[int]], lengths: list[int]) -> Sequences:
  """Responses after a prompt of one token."""
  tokens = jnp.array(response)
  rows, columns = tokens.shape
  return Sequences(
    prompt=jnp.ones((rows, 1), jnp.int32),
    prompt_mask=jnp.ones((rows, 1), bool),
    response=tokens,
    response_mask=jnp.arange(columns) < jnp.array(lengths)[:, None],
  )


STOP = 9
RESPONSES = [
  [STOP, 1, STOP, STOP, 1],  # before the position it does not count; the first after it does
  [1, 2, 3, 4, 5],  # none
  [1, 2, STOP, 1, 1],  # behind the end of the response it does not count
  [1, 2, 3, 4, STOP],  # as the last token
]


def test_scoring_cuts_after_the_first_stop_at_or_after_a_position() -> None:
  """As `truncate` and `filter` of the code of Ziegler et al. 2019, with position 2."""
  sequences = make_sequences(RESPONSES, [5, 5, 2, 5])
  config = PPOConfig(score_truncation_token=STOP, score_truncation_after=2)
  cut = truncate_for_scoring(sequences, jnp.array([False, True, True, False]), config)
  np.testing.assert_array_equal(cut.sequences.response_mask.sum(-1), [3, 5, 2, 5])
  np.testing.assert_array_equal(cut.stopped, [True, False, False, True])


def test_the_cut_equals_the_released_codes_loop() -> None:
  """Random responses against that code's masks, one token at a time."""
  rng = np.random.default_rng(1)
  tokens = rng.integers(0, 3, (40, 6))
  config = PPOConfig(score_truncation_token=1, score_truncation_after=2)
  run = quick.jit(lambda rows: truncate_for_scoring(rows, jnp.zeros(40, bool), config))
  cut = jax.device_get(run(make_sequences(tokens.tolist(), [6] * 40)))
  for row, kept, stopped in zip(tokens, cut.sequences.response_mask, cut.stopped, strict=True):
    seen, expected = 0, []
    for t, token in enumerate(row):
      hit = int(token == 1 and t >= 2)
      seen += hit
      expected.append(seen - hit == 0)
    assert kept.tolist() == expected
    assert bool(stopped) == (1 in row[2:])


def test_only_the_mask_is_cut() -> None:
  """Prompts and tokens are those that were sampled: training sees the whole response."""
  sequences = make_sequences(RESPONSES, [5, 5, 2, 5])
  config = PPOConfig(score_truncation_token=STOP, score_truncation_after=2)
  cut = truncate_for_scoring(sequences, jnp.ones(4, bool), config).sequences
  for name in ('prompt', 'prompt_mask', 'response'):
    np.testing.assert_array_equal(getattr(cut, name), getattr(sequences, name))
  np.testing.assert_array_equal(sequences.response_mask.sum(-1), [5, 5, 2, 5])


def test_without_a_token_nothing_is_cut() -> None:
  """Off by default: the sequences and the sampler's own verdict pass through."""
  sequences = make_sequences(RESPONSES, [5, 5, 2, 5])
  finished = jnp.array([True, False, True, False])
  scored = truncate_for_scoring(sequences, finished, PPOConfig())
  assert scored.sequences is sequences and scored.stopped is finished


def test_scores_do_not_depend_on_their_row() -> None:
  """Permuting rows permutes rewards: no row is paid another's score."""
  order = np.random.default_rng(0).permutation(4)
  config = PPOConfig(score_placement='after_stop')
  scores, penalties = (jnp.asarray(x, jnp.float32) for x in (SCORES, PENALTIES))
  straight = shape_rewards(scores, penalties, MASK, config)
  shuffled = shape_rewards(scores[order], penalties[order], MASK[order], config)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[order], b), straight, shuffled)
