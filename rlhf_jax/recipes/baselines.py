"""What the reference's response to a prompt is expected to score: a linear value on its trunk."""

import jax
import numpy as np

from rlhf_jax.common.processes import to_host
from rlhf_jax.common.types import Sequences
from rlhf_jax.data.pipeline import Columns
from rlhf_jax.models import roles
from rlhf_jax.recipes.parts import Parts, init_decoder
from rlhf_jax.recipes.probes import device_batches

Array = np.ndarray

# Ridge penalties tried, in units of the features' mean squared length.
_PENALTIES = tuple(10.0**power for power in range(-6, 3))


def reference_baselines(parts: Parts, columns: Columns) -> Array:
  """V_ref(x) of every row's prompt, `[N]` float64, for A-LoL's advantages.

  A linear head on the frozen reference's state at the end of the prompt is fitted to the rows'
  scores by ridge regression; each row is predicted from the others. (Baheti et al. 2024, section
  3.1, train a small network there on scores of the reference's own responses; here the given
  responses stand for those, as they do where the reference was trained on their like.)
  """

  @jax.jit
  def read(params: object, sequences: Sequences) -> jax.Array:
    return roles.prompt_states(parts.model, params, sequences)  # type: ignore[arg-type]

  reference = parts.reference if parts.reference is not None else init_decoder(parts)
  states = [
    to_host(read(reference, batch.sequences)).astype(np.float64)[real]
    for batch, real in device_batches(parts, columns)
  ]
  return leave_one_out_ridge(
    np.concatenate(states), np.asarray(columns.extras['score'], np.float64)
  )


def leave_one_out_ridge(features: Array, goals: Array) -> Array:
  """`[N, D]` features, `[N]` goals -> `[N]` predictions of each row from all others.

  The prediction is y - (y - fit) / (1 - leverage) (Allen 1974, PRESS); the penalty of a fixed grid
  is taken that makes its squared error least. The mean is not penalised.
  """
  count = len(goals)
  centred = features - features.mean(0)
  target = goals - goals.mean()
  left, scales, _ = np.linalg.svd(centred, full_matrices=False)
  unit = np.square(scales).sum() / max(len(scales), 1)
  best, best_error = np.full(count, goals.mean()), np.inf
  for penalty in _PENALTIES:
    shrink = np.square(scales) / (np.square(scales) + penalty * max(unit, 1e-12))
    fit = left @ (shrink * (left.T @ target))
    leverage = np.square(left) @ shrink + 1 / count
    residual = (target - fit) / np.maximum(1 - leverage, 1e-9)
    error = float(np.square(residual).sum())
    if error < best_error:
      best, best_error = goals - residual, error
  return best
