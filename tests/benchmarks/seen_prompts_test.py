"""The distance to the optimum on prompts of training and on others."""

import numpy as np
import pytest

from benchmarks.seen_prompts import measure


def test_the_share_is_that_of_the_possible_gain() -> None:
  """Rewards 0 or 4 with a half each: at KL log 2 the best is 4, and half of the gain is 3."""
  start = np.tile([0.0, 4.0], (50, 200))
  spent = np.full((2, 50), np.log(2) - 0.05)
  for gold in (4.0, 3.0, 2.0):
    row = measure(np.full((2, 50), gold), spent, start)
    assert row.prompts == 50 and row.gold.mean == gold
    assert row.optimum.mean == pytest.approx(4.0, abs=0.3)
    assert row.share == pytest.approx((gold - 2) / (row.optimum.mean - 2))
