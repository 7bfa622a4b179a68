"""Actors without a network, on which the properties of objectives are tested.

`TABLES` are actors whose parameters are tables: the log-probs of a token depend on its place and
the token before it. `DIRECT` are actors whose parameters are their outputs, so that a gradient by
the parameters is a gradient by log-probs, values or scores.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.common.types import PolicyOutput, QOutput, Sequences
from rlhf_jax.objectives import Actors, ObjectiveConfig, objective_of
from rlhf_jax.ops.logprobs import entropy, token_logprobs
from tests import numerical, quick
from tests.objectives.batches import SHAPES, VOCAB, B, R, make_batch

__all__ = ['DIRECT', 'TABLES', 'B', 'R', 'evaluator', 'make_batch', 'make_outputs', 'make_tables']


def make_tables(seed: int = 1, length: int = R + 4) -> dict[str, jax.Array]:
  """Parameters for `TABLES`, for up to `length` response tokens."""
  rng = np.random.default_rng(seed)
  states = (length, VOCAB)
  shapes = {'policy': (*states, VOCAB), 'value': states, 'reward': (VOCAB,)}
  shapes |= {name: (2, *states, VOCAB) for name in ('q', 'target_q')}
  return {name: jnp.asarray(rng.normal(0, 1, shape), jnp.float32) for name, shape in shapes.items()}


def states_of(sequences: Sequences) -> tuple[jax.Array, jax.Array]:
  """Place and previous token of every response token."""
  before = jnp.concatenate([sequences.prompt[..., -1:], sequences.response[..., :-1]], axis=-1)
  return jnp.arange(before.shape[-1]), before


def table_policy(params: Any, sequences: Sequences) -> PolicyOutput:
  """Logits and values looked up by place and previous token."""
  states = states_of(sequences)
  logits = params['policy'][states]
  return PolicyOutput(
    logprobs=token_logprobs(logits, sequences.response),
    entropy=entropy(logits),
    values=params['value'][states],
  )


def table_q(params: Any, sequences: Sequences) -> QOutput:
  """Q and its slow copies looked up like the logits; the state after the last token is worth 0."""
  places, before = states_of(sequences)
  policy = table_policy(params, sequences)
  assert policy.values is not None
  mask = sequences.response_mask
  following = jnp.concatenate([mask[:, 1:], jnp.zeros_like(mask[:, :1])], axis=-1)
  values = jnp.concatenate([policy.values[:, 1:], jnp.zeros_like(policy.values[:, :1])], axis=-1)
  actions = sequences.response[None, ..., None]
  q, slow = (params[name][:, places, before] for name in ('q', 'target_q'))
  return QOutput(
    logprobs=policy.logprobs,
    values=policy.values,
    next_values=jnp.where(following, values, 0.0),
    q=jnp.take_along_axis(q, actions, axis=-1)[..., 0],
    target_q=jnp.take_along_axis(slow, actions, axis=-1)[..., 0].min(0),
    q_nll=jnp.stack([-token_logprobs(one, sequences.response) for one in q]),
  )


def table_reward(params: Any, sequences: Sequences) -> jax.Array:
  """The sum over real tokens, prompt and response, of what each is worth."""
  prompt = jnp.where(sequences.prompt_mask, params['reward'][sequences.prompt], 0.0)
  response = jnp.where(sequences.response_mask, params['reward'][sequences.response], 0.0)
  return prompt.sum(-1) + 2 * response.sum(-1)


def table_token_reward(params: Any, sequences: Sequences) -> jax.Array:
  """What the response is worth up to each of its tokens."""
  worth = jnp.where(sequences.response_mask, params['reward'][sequences.response], 0.0)
  return worth.cumsum(-1)


TABLES = Actors(table_policy, table_reward, table_token_reward, table_q)


def direct_policy(params: Any, sequences: Sequences) -> PolicyOutput:
  """The parameters as they are, `[..., R]`; the leading axes are brought to the sequences'."""
  shape = sequences.response.shape
  return PolicyOutput(
    **{
      name: params[name if name in params else 'logprobs'].reshape(shape)
      for name in ('logprobs', 'entropy', 'values')
    }
  )


def direct_q(params: Any, sequences: Sequences) -> QOutput:
  """The parameters as they are."""
  del sequences
  names = ('logprobs', 'values', 'next_values', 'q', 'target_q', 'q_nll')
  return QOutput(**{name: params[name] for name in names})


DIRECT = Actors(
  policy=direct_policy,
  reward=lambda params, sequences: params['scores'].reshape(-1),
  token_reward=lambda params, sequences: params['token_scores'],
  q=direct_q,
)


def make_outputs(kind: str, seed: int = 2, length: int = R) -> dict[str, np.ndarray]:
  """Parameters for `DIRECT` on a kind of batch, float32; those of Q for single responses only.

  They are of texts of `length` tokens.
  """
  rng = np.random.default_rng(seed)
  rows = SHAPES.get(kind, (B,))
  shape = (*rows, length)
  outputs = {name: rng.normal(0, 1, shape) for name in ('entropy', 'values')}
  outputs['logprobs'] = -1.6 + 0.4 * rng.normal(0, 1, shape)
  outputs['scores'] = rng.normal(0, 1, rows)
  if len(rows) == 1:
    outputs |= {
      name: rng.normal(0, 1, shape) for name in ('token_scores', 'next_values', 'target_q')
    }
    outputs['q'] = rng.normal(0, 1, (2, *shape))
    outputs['q_nll'] = rng.exponential(1, (2, *shape))
  return {name: values.astype(np.float32) for name, values in outputs.items()}


# `(params, batch) -> (loss as Mean, metrics, gradient of the loss's total by params)`
Evaluate = Callable[[Any, Any], tuple[Any, Any, Any]]
_EVALUATORS: dict[tuple[str, Actors], Evaluate] = {}


def evaluator(config: ObjectiveConfig, actors: Actors) -> Evaluate:
  """The jitted loss of a config with its gradient; equal configs share one compiled function."""
  key = (repr(config), actors)
  if key not in _EVALUATORS:
    objective = objective_of(config)

    @quick.jit
    def evaluate(params: Any, batch: Any) -> tuple[Any, Any, Any]:
      def total(params: Any) -> Any:
        mean, metrics = objective.loss(config, actors, params, batch)
        return mean.total, (mean, metrics)

      slopes, (mean, metrics) = jax.grad(total, has_aux=True)(params)
      return mean, metrics, slopes

    _EVALUATORS[key] = evaluate
  return _EVALUATORS[key]


def prepared(config: ObjectiveConfig, batch: Any) -> Any:
  """What the loss eats: the batch after its objective has counted it, where it does."""
  objective = objective_of(config)
  if objective.demands(config).prepares != 'counts':
    return batch
  assert objective.prepare is not None
  return objective.prepare(config, Actors(), {}, None, batch)


def direct_loss(config: ObjectiveConfig, outputs: Any, batch: Any) -> tuple[float, dict[str, Any]]:
  """The mean loss of given outputs, and its gradients by each of them."""
  mean, _, slopes = evaluator(config, DIRECT)(outputs, batch)
  return float(mean.value()), {name: np.asarray(x) / mean.weight for name, x in slopes.items()}


def assert_equals_slow_loss(
  config: ObjectiveConfig,
  batch: Any,
  outputs: dict[str, np.ndarray],
  slow: Callable[[dict[str, np.ndarray]], float],
  *names: str,
) -> None:
  """The loss is that of `slow`, from float64 outputs to a mean, and so are its gradients.

  Gradients by the outputs `names` are compared with central differences; all others must be 0.
  """
  wide = {name: values.astype(np.float64) for name, values in outputs.items()}
  loss, slopes = direct_loss(config, outputs, batch)
  np.testing.assert_allclose(loss, slow(wide), rtol=1e-5, atol=1e-6)
  for name, slope in slopes.items():
    expected: Any = 0.0
    if name in names:

      def moved(x: np.ndarray, name: str = name) -> float:
        return slow(wide | {name: x})

      expected = numerical.gradient(moved, wide[name])
      assert expected.any(), name
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=2e-6, err_msg=name)
