"""What an objective is: a typed config, its pure maths, and a loss that feeds it."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.common.types import Pairs, PolicyOutput, Sequences

Array = jax.Array
Params = Mapping[str, Any]
LossOutput = tuple[metrics_lib.Mean, metrics_lib.Metrics]


class Actors(NamedTuple):
  """The apply functions a loss may call; an objective knows nothing else of models.

  Attributes:
    policy: `(params, sequences [B, ...]) -> PolicyOutput`, with values where the recipe has a value
      function.
    reward: `(params, sequences [B, ...]) -> [B]` float32 unnormalised scores.
  """

  policy: Callable[[Params, Sequences], PolicyOutput] | None = None
  reward: Callable[[Params, Sequences], Array] | None = None


class Objective(NamedTuple):
  """A row of the table of objectives.

  Attributes:
    name: as in run records and reports.
    config: the config class that selects it.
    data: what it eats.
    loss: `(config, actors, params, batch) -> (Mean, metrics)`. Gradients are taken of the total and
      divided once by the weight summed over everything that makes up one optimizer update.
    reference: whether, under a given config, batches carry the frozen reference's log-probs.
    difference: `(config, actors, params, batch) -> [B]` float32, the log-odds that the first
      response is preferred, as the trained model implies them; None where it implies none.
  """

  name: str
  config: type
  data: Literal['demonstrations', 'comparisons', 'prompts']
  loss: Callable[[Any, Actors, Params, Any], LossOutput]
  reference: Callable[[Any], bool]
  difference: Callable[[Any, Actors, Params, Any], Array] | None = None


def flatten_pairs(sequences: Sequences) -> Sequences:
  """`[B, 2, ...]` -> `[2B, ...]`: chosen and rejected in one forward pass."""
  return jax.tree.map(lambda x: x.reshape((-1,) + x.shape[2:]), sequences)


def of_preferred(values: Array, preference: Array) -> Array:
  """What `values` `[B, 2]` say of the preferred response, `[B]`; at a tie the mean of both.

  Ties count half on each side, as in the released code of Hejna et al. 2023.
  """
  first = 0.5 * (jnp.sign(preference - 0.5) + 1)
  return first * values[:, 0] + (1 - first) * values[:, 1]


def pair_logprobs(actors: Actors, params: Params, pairs: Pairs) -> Array:
  """Per-token log-probs of both responses, `[B, 2, R]` float32."""
  assert actors.policy is not None
  logprobs = actors.policy(params, flatten_pairs(pairs.sequences)).logprobs
  return logprobs.reshape(pairs.sequences.response.shape)
