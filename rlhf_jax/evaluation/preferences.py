"""Does the model prefer what people preferred? Accuracy, log-loss and calibration."""

import numpy as np


def verdicts_right(differences: np.ndarray, preference: np.ndarray) -> np.ndarray:
  """`[N]`: 1 where the predicted verdict is the label's, 0.5 at predicted ties, 0 elsewhere.

  Rows that are labelled ties (0.5) are left out: there is no verdict to be got right.
  """
  decided = preference != 0.5
  right = np.where(differences == 0, 0.5, (differences > 0) == (preference > 0.5))
  return right[decided].astype(np.float64)


def log_losses(differences: np.ndarray, preference: np.ndarray) -> np.ndarray:
  """`[N]` float64 negative log-likelihoods of the labels, in nats."""
  differences = np.asarray(differences, np.float64)
  preference = np.asarray(preference, np.float64)
  return preference * np.logaddexp(0, -differences) + (1 - preference) * np.logaddexp(
    0, differences
  )


def preference_scores(
  differences: np.ndarray, preference: np.ndarray, bins: int = 10
) -> dict[str, float]:
  """Scores predicted log-odds against labels.

  Args:
    differences: `[N]` predicted log-odds that the first response is preferred.
    preference: `[N]` labelled probability of the same; 0.5 is a tie.
    bins: equal-width confidence bins of the calibration error.

  Returns:
    'accuracy' (a predicted tie is half right; labelled ties are left out), 'log_loss' in nats, and
    'calibration_error', the expected calibration error (Guo et al. 2017, eq. 3) of the confidence
    in the predicted verdict.
  """
  differences = np.asarray(differences, np.float64)
  preference = np.asarray(preference, np.float64)
  decided = preference != 0.5
  right = verdicts_right(differences, preference)
  confidence = 1 / (1 + np.exp(-np.abs(differences[decided])))
  bin_of = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
  gaps = [abs((right[bin_of == b] - confidence[bin_of == b]).sum()) for b in range(bins)]
  count = max(int(decided.sum()), 1)
  return {
    'accuracy': float(right.sum() / count),
    'log_loss': float(log_losses(differences, preference).mean()),
    'calibration_error': float(sum(gaps) / count),
  }
