"""Accuracy, log-loss and calibration of predicted preferences, by hand and by simulation."""

import numpy as np
import pytest

from rlhf_jax.evaluation.preferences import preference_scores, verdicts_right
from rlhf_jax.objectives.reward_model import preference_metrics


def test_accuracy_by_hand() -> None:
  """Right, wrong, a predicted tie (half), and a labelled tie (left out)."""
  scores = preference_scores(np.array([2.0, -1.0, 0.0, 5.0]), np.array([1.0, 0.8, 1.0, 0.5]))
  assert scores['accuracy'] == 0.5
  np.testing.assert_array_equal(
    verdicts_right(np.array([2.0, -1.0, 0.0, 5.0]), np.array([1.0, 0.8, 1.0, 0.5])), [1, 0, 0.5]
  )


def test_log_loss_by_hand() -> None:
  """Cross-entropy in nats with soft labels; log 2 for a model that never decides."""
  assert preference_scores(np.zeros(3), np.array([1.0, 0.5, 0.7]))['log_loss'] == pytest.approx(
    np.log(2)
  )
  p = 1 / (1 + np.exp(-2.0))
  scores = preference_scores(np.array([2.0]), np.array([0.75]))
  assert scores['log_loss'] == pytest.approx(-0.75 * np.log(p) - 0.25 * np.log(1 - p))


def test_large_differences_do_not_overflow() -> None:
  """Certainty that is wrong costs its log-odds, certainty that is right nothing."""
  scores = preference_scores(np.array([1e4, -1e4]), np.array([1.0, 1.0]))
  assert scores['log_loss'] == pytest.approx(5e3)
  assert scores['calibration_error'] == pytest.approx(0.5)


def test_calibration_error_by_hand() -> None:
  """Two bins: |right - confidence| within each bin, weighted with its share of verdicts.

  Confidences .6, .6 (one right) and .9, .9 (both right) fall in bins [.5, .75) and [.75, 1]:
  1/2 |.5 - .6| + 1/2 |1 - .9| = .1.
  """
  logit = {c: np.log(c / (1 - c)) for c in (0.6, 0.9)}
  differences = np.array([logit[0.6], logit[0.6], logit[0.9], -logit[0.9]])
  labels = np.array([1.0, 0.0, 1.0, 0.0])
  scores = preference_scores(differences, labels, bins=2)
  assert scores['calibration_error'] == pytest.approx(0.1)


def test_calibration_error_is_small_for_the_true_probabilities() -> None:
  """Labels drawn from the predicted probabilities; twice the log-odds are overconfident."""
  rng = np.random.default_rng(0)
  differences = rng.normal(0, 1.5, 20_000)
  labels = (rng.random(20_000) < 1 / (1 + np.exp(-differences))).astype(float)
  honest, boastful = (preference_scores(k * differences, labels) for k in (1, 2))
  assert honest['calibration_error'] < 0.015
  assert boastful['calibration_error'] > 0.08
  assert boastful['accuracy'] == honest['accuracy']
  assert honest['log_loss'] < boastful['log_loss']


def test_exchanging_responses_changes_nothing() -> None:
  """Negated differences with mirrored labels have the same scores."""
  rng = np.random.default_rng(1)
  differences, labels = rng.normal(0, 1, 50), rng.choice([0.0, 0.5, 1.0], 50)
  assert preference_scores(-differences, 1 - labels) == pytest.approx(
    preference_scores(differences, labels)
  )


def test_agrees_with_the_training_metrics() -> None:
  """The same accuracy and log-loss that a reward model reports while it trains."""
  rng = np.random.default_rng(2)
  differences = rng.normal(0, 1, 60).astype(np.float32)
  differences[:5] = 0.0
  labels = rng.choice([0.5, 0.8, 1.0], 60).astype(np.float32)
  scores = preference_scores(differences, labels)
  for name, metric in preference_metrics(differences, labels).items():  # type: ignore[arg-type]
    assert scores[name] == pytest.approx(float(metric.value()), rel=1e-5)


def test_all_ties_have_no_accuracy_to_speak_of() -> None:
  """0 of 0 is reported as 0, without a warning; the log-loss is still defined."""
  scores = preference_scores(np.array([1.0, -1.0]), np.array([0.5, 0.5]))
  assert scores['accuracy'] == scores['calibration_error'] == 0.0
  assert np.isfinite(scores['log_loss'])
