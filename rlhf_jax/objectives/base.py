"""What an objective is: a typed config, its pure maths, and a loss that feeds it."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.common.types import Experience, Pairs, PolicyOutput, QOutput, Sequences

Array = jax.Array
Params = Mapping[str, Any]
LossOutput = tuple[metrics_lib.Mean, metrics_lib.Metrics]
Carry = dict[str, Array]


class ObjectiveConfig(Protocol):
  """What all objectives' configs have in common."""

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""


class Actors(NamedTuple):
  """The apply functions a loss may call; an objective knows nothing else of models.

  Attributes:
    policy: `(params, sequences [B, ...]) -> PolicyOutput`, with values where the recipe has a value
      function.
    reward: `(params, sequences [B, ...]) -> [B]` float32 unnormalised scores.
    token_reward: `(params, sequences [B, ...]) -> [B, R]` float32 unnormalised scores, read at each
      response token.
    q: `(params, sequences [B, ...]) -> QOutput`.
  """

  policy: Callable[[Params, Sequences], PolicyOutput] | None = None
  reward: Callable[[Params, Sequences], Array] | None = None
  token_reward: Callable[[Params, Sequences], Array] | None = None
  q: Callable[[Params, Sequences], QOutput] | None = None


class Collected(NamedTuple):
  """What an objective makes of its samples.

  Attributes:
    batch: what the loss eats; its leaves have rows in front.
    carry: the objective's memory for the next iteration.
    metrics: what is worth watching.
  """

  batch: Any
  carry: Carry
  metrics: metrics_lib.Metrics


class Curated(NamedTuple):
  """What an objective makes of a dataset's ratings before the first step.

  Attributes:
    scores: `[N]` float, what batches carry in the place of the ratings.
    keep: `[N]` bool, the rows to learn from.
    weights: `[N]` float, rows are drawn in proportion to it, with replacement; None: each row once
      an epoch.
  """

  scores: np.ndarray
  keep: np.ndarray
  weights: np.ndarray | None = None


Data = Literal['demonstrations', 'comparisons', 'ratings', 'rankings', 'step_ratings', 'prompts']


def never(config: Any) -> bool:
  """For objectives that need no reference."""
  del config
  return False


def always(config: Any) -> bool:
  """For objectives that need a reference in every variant."""
  del config
  return True


class Objective(NamedTuple):
  """A row of the table of objectives.

  Attributes:
    name: as in run records and reports.
    config: the config class that selects it.
    data: what it eats; objectives that eat prompts learn from their own samples.
    loss: `(config, actors, params, batch) -> (Mean, metrics)`. Gradients are taken of the total and
      divided once by the weight summed over everything that makes up one optimizer update.
    reference: whether, under a given config, it needs the log-probs of a frozen reference: the
      batches of given responses then carry them, samples always do.
    difference: `(config, actors, params, batch) -> [B]` float32, the log-odds that the first
      response of a pair is preferred, as the trained model implies them; None where it implies
      none.
    prepare: `(config, actors, params, reference, batch) -> batch`: what is computed once a step,
      without gradients, from the whole batch (a microbatch sees only its part). `params` and
      `reference` are both by role; the reference's log-probs are in the batch already.
    curate: `(config, scores, baselines) -> Curated`, for objectives that eat ratings: from all
      scores `[N]` of the dataset; `baselines()` gives `[N]` estimates of the score that the
      reference's response to the same prompt would have had.
    collect: `(config, experience, carry) -> Collected`, for objectives that eat prompts.
    carry: initial memory of `collect`, numbers by name.
    trains: the role of what is trained.
  """

  name: str
  config: type
  data: Data
  loss: Callable[[Any, Actors, Params, Any], LossOutput]
  reference: Callable[[Any], bool] = never
  difference: Callable[[Any, Actors, Params, Any], Array] | None = None
  prepare: Callable[[Any, Actors, Params, Params | None, Any], Any] | None = None
  curate: Callable[[Any, np.ndarray, Callable[[], np.ndarray]], Curated] | None = None
  collect: Callable[[Any, Experience, Carry], Collected] | None = None
  carry: Callable[[Any], dict[str, float]] = lambda config: {}
  trains: Literal['policy', 'reward_model'] = 'policy'


def flatten_rows(sequences: Sequences) -> Sequences:
  """`[B, K, ...]` -> `[B K, ...]`: all responses of a row in one forward pass; `[B, ...]` stays."""
  if sequences.response_mask.ndim == 2:
    return sequences
  return jax.tree.map(lambda x: x.reshape((-1,) + x.shape[2:]), sequences)


def of_preferred(values: Array, preference: Array) -> Array:
  """What `values` `[B, 2]` say of the preferred response, `[B]`; at a tie the mean of both.

  (The released code of Hejna et al. 2023 imitates both segments of a tie, each in full.)
  """
  first = 0.5 * (jnp.sign(preference - 0.5) + 1)
  return first * values[:, 0] + (1 - first) * values[:, 1]


def response_logprobs(actors: Actors, params: Params, sequences: Sequences) -> Array:
  """Per-token log-probs of every response, float32 in the shape of the response mask."""
  assert actors.policy is not None
  logprobs = actors.policy(params, flatten_rows(sequences)).logprobs
  return logprobs.reshape(sequences.response_mask.shape)


def pair_logprobs(actors: Actors, params: Params, pairs: Pairs) -> Array:
  """Per-token log-probs of both responses, `[B, 2, R]` float32."""
  return response_logprobs(actors, params, pairs.sequences)
