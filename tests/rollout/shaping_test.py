"""What responses are scored as: cuts and missing stops, against slow loops over single rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.checks import ShapeError
from rlhf_jax.common.types import Sequences
from rlhf_jax.rollout.config import RolloutConfig
from rlhf_jax.rollout.shaping import handle_missing_stop, truncate_for_scoring
from tests import quick


def test_integer_scores_are_refused() -> None:
  """A score of 0.7 as an integer is 0."""
  config = RolloutConfig()
  with pytest.raises(ShapeError, match='scores: expected a floating-point array'):
    handle_missing_stop(jnp.ones(4, int), jnp.ones(4, bool), config)


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
  config = RolloutConfig(missing_stop=option, missing_stop_value=value)
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
  config = RolloutConfig(score_truncation_token=STOP, score_truncation_after=2)
  cut = truncate_for_scoring(sequences, jnp.array([False, True, True, False]), config)
  np.testing.assert_array_equal(cut.sequences.response_mask.sum(-1), [3, 5, 2, 5])
  np.testing.assert_array_equal(cut.stopped, [True, False, False, True])


def test_the_cut_equals_the_released_codes_loop() -> None:
  """Random responses against that code's masks, one token at a time."""
  rng = np.random.default_rng(1)
  tokens = rng.integers(0, 3, (40, 6))
  config = RolloutConfig(score_truncation_token=1, score_truncation_after=2)
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
  config = RolloutConfig(score_truncation_token=STOP, score_truncation_after=2)
  cut = truncate_for_scoring(sequences, jnp.ones(4, bool), config).sequences
  for name in ('prompt', 'prompt_mask', 'response'):
    np.testing.assert_array_equal(getattr(cut, name), getattr(sequences, name))
  np.testing.assert_array_equal(sequences.response_mask.sum(-1), [5, 5, 2, 5])


def test_without_a_token_nothing_is_cut() -> None:
  """Off by default: the sequences and the sampler's own verdict pass through."""
  sequences = make_sequences(RESPONSES, [5, 5, 2, 5])
  finished = jnp.array([True, False, True, False])
  scored = truncate_for_scoring(sequences, finished, RolloutConfig())
  assert scored.sequences is sequences and scored.stopped is finished
