"""The progress line counts steps, tokens and seconds since the last one."""

import io

import pytest

from rlhf_jax.training import progress
from rlhf_jax.training.progress import Progress, duration


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [
    (0, '0:00'),
    (59.4, '0:59'),
    (59.6, '1:00'),
    (75, '1:15'),
    (3599.9, '1:00:00'),
    (3675, '1:01:15'),
  ],
)
def test_durations(seconds: float, text: str) -> None:
  assert duration(seconds) == text


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
  """Its one entry is the time."""
  now = [100.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
  return now


def test_speeds_are_those_since_the_last_line(clock: list[float]) -> None:
  """10 steps in 2 s are 5 a second; 80 more take 16 s."""
  out = io.StringIO()
  line = Progress('dpo', 100, out=out)
  clock[0] += 50
  line.line(10, 10, {})
  clock[0] += 2
  line.line(20, 3010, {'loss': 0.693147, 'kl': 1e-7})
  assert out.getvalue().splitlines()[1] == (
    'dpo 20/100 | 5.00 steps/s 1,500 tokens/s ETA 0:16 | loss 0.6931 kl 1e-07'
  )


def test_compilation_and_evaluation_are_left_out(clock: list[float]) -> None:
  """The first step took 30 s of compiling, the evaluation 7 s; 4 steps took 2 s.

  A step sees 50 tokens; 1000 were seen before this process began.
  """
  out = io.StringIO()
  line = Progress('sft', 9, tokens=1000, out=out)
  clock[0] += 30
  line.compiled(1, 1050)
  clock[0] += 2
  line.line(5, 1250, {})
  assert '| 2.00 steps/s 100 tokens/s ETA 0:02' in out.getvalue()
  clock[0] += 7
  line.skip()
  clock[0] += 1
  line.line(7, 1350, {})
  assert '| 2.00 steps/s 100 tokens/s ETA 0:01' in out.getvalue()


def test_a_line_before_any_measured_step_does_not_guess(clock: list[float]) -> None:
  out = io.StringIO()
  line = Progress('sft', 9, out=out)
  clock[0] += 30
  line.compiled(1, 100)
  line.line(1, 100, {})
  assert '| ? steps/s ? tokens/s ETA ? |' in out.getvalue()
