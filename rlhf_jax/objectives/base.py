"""What an objective is: a typed config, its pure maths, and a loss that feeds it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.types import Experience, Pairs, PolicyOutput, QOutput, Sequences

Array = jax.Array
Params = Mapping[str, Any]
LossOutput = tuple[metrics_lib.Mean, metrics_lib.Metrics]
Carry = dict[str, Array]


class ObjectiveConfig(Protocol):
  """What all objectives' configs have in common."""

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""


def check_unread(config: Any, path: str, fields: tuple[str, ...], where: str) -> None:
  """Raises ConfigError for fields that are set although nothing reads them where the config is.

  Args:
    config: a dataclass.
    path: its own.
    fields: those that are not read.
    where: which value of which other field that is so with.
  """
  defaults = {field.name: field.default for field in dataclasses.fields(config)}
  for name in fields:
    if getattr(config, name) != defaults[name]:
      raise ConfigError(
        f'{path}.{name}',
        getattr(config, name),
        f'its default, {defaults[name]!r}, {where}',
        'Nothing reads it there.',
      )


class Actors(NamedTuple):
  """The apply functions a loss may call; an objective knows nothing else of models.

  Sequences are `[B, ...]`; policies and rewards also take responses `[B, K, R]` that share their
  prompts `[B, 1, P]`, and what they say has the leading axes of the responses.

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


class QLearning(NamedTuple):
  """How Q and V heads beside the policy are learnt and used.

  Attributes:
    target_rate: how far the slow copies of Q move towards Q in an optimizer update.
    decode_beta: strength of the tilt log pi + beta (Q - V) when responses are sampled.
  """

  target_rate: float
  decode_beta: float = 0.0


class Normalization(NamedTuple):
  """How a reward model's gain and bias are set, which are kept with its parameters.

  Attributes:
    kind: 'none', or over what: 'policy_samples' (before and after training) or 'demonstrations'
      (after it).
    samples: how many responses.
  """

  kind: str = 'none'
  samples: int = 0


class Demands(NamedTuple):
  """What the settings of an objective ask of the stage around its loss.

  Attributes:
    epochs: passes over the rows of an iteration.
    minibatches: optimizer updates in each pass.
    samples: responses drawn to each prompt of a batch.
    rows: rows that `collect` makes of a prompt's samples, adjacent.
    sampler: who draws them.
    value: where the value function sits, on the policy's trunk ('shared'), on one of its own
      copied from the policy ('separate') or from the reward model ('reward_model'); None: there is
      none.
    q: Q and V heads beside the policy; None: there are none.
    cached_reference: whether the reference scores the whole dataset before the first step.
    compares_rows: whether a row is estimated from the other rows of its batch.
    prepares: what the objective's `prepare` does: 'nothing' (it is not called), 'counts' the whole
      batch, or 'reads' it with what is trained.
    group: how many rows of a batch the loss compares with each other: 1, each row stands alone; 0,
      all of them. Row b is in group b mod (the number of groups), so that microbatches hold whole
      groups (`common.rows.split_rows`).
    fixed_length: whether responses must all be as long as their block.
    normalization: of a reward model.
    unpayable: why a policy cannot be paid what the trained reward model says; '': it can.
  """

  epochs: int = 1
  minibatches: int = 1
  samples: int = 1
  rows: int = 1
  sampler: Literal['policy', 'reference'] = 'policy'
  value: Literal['shared', 'separate', 'reward_model'] | None = None
  q: QLearning | None = None
  cached_reference: bool = False
  compares_rows: bool = False
  prepares: Literal['nothing', 'counts', 'reads'] = 'nothing'
  group: int = 1
  fixed_length: bool = False
  normalization: Normalization = Normalization()
  unpayable: str = ''


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
      without gradients, from the whole batch (a microbatch sees only its part), where `demands`
      ask for it. `params` and `reference` are both by role; the reference's log-probs are in the
      batch already.
    curate: `(config, scores, baselines) -> Curated`, for objectives that eat ratings: from all
      scores `[N]` of the dataset; `baselines()` gives `[N]` estimates of the score that the
      reference's response to the same prompt would have had.
    unlearnable: `(config, scores) -> str`, for objectives that eat ratings: why nothing can be
      learnt from all scores `[N]` float32 of the dataset; '': something can.
    collect: `(config, experience, carry) -> Collected`, for objectives that eat prompts.
    carry: initial memory of `collect`, numbers by name.
    trains: the role of what is trained.
    demands: from a config, what it asks of the stage around the loss.
    domains: 'text', 'control' (a Gaussian policy on segments of states and actions) or both.
    by_token: whether the trained reward model scores tokens, not whole responses.
  """

  name: str
  config: type
  data: Data
  loss: Callable[[Any, Actors, Params, Any], LossOutput]
  reference: Callable[[Any], bool] = never
  difference: Callable[[Any, Actors, Params, Any], Array] | None = None
  prepare: Callable[[Any, Actors, Params, Params | None, Any], Any] | None = None
  curate: Callable[[Any, np.ndarray, Callable[[], np.ndarray]], Curated] | None = None
  unlearnable: Callable[[Any, np.ndarray], str] | None = None
  collect: Callable[[Any, Experience, Carry], Collected] | None = None
  carry: Callable[[Any], dict[str, float]] = lambda config: {}
  trains: Literal['policy', 'reward_model'] = 'policy'
  demands: Callable[[Any], Demands] = lambda config: Demands()
  domains: tuple[Literal['text', 'control'], ...] = ('text',)
  by_token: bool = False

  @property
  def paid(self) -> bool:
    """Whether it learns from a reward: of its own samples, or of the steps it is given."""
    return self.trains == 'policy' and self.data in ('prompts', 'step_ratings')


def flatten_rows(sequences: Sequences) -> Sequences:
  """`[B, K, ...]` -> `[B K, ...]`: all responses of a row in one forward pass.

  `[B, ...]` stays as it is, and so do responses that share their prompts.
  """
  if sequences.response_mask.ndim == 2 or sequences.shares_prompts:
    return sequences
  return jax.tree.map(lambda x: x.reshape((-1,) + x.shape[2:]), sequences)


def of_preferred(values: Array, preference: Array) -> Array:
  """What `values` `[B, 2]` say of the preferred response, `[B]`; at a tie the mean of both."""
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
