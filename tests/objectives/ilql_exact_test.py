"""ILQL on a problem small enough for exact dynamic programming: every prefix is a state."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.common.types import QOutput, Ratings, Sequences
from rlhf_jax.objectives import ilql
from rlhf_jax.objectives.base import Actors
from rlhf_jax.objectives.ilql import ILQLConfig
from rlhf_jax.ops.logprobs import token_logprobs
from rlhf_jax.training.state import TrainState
from rlhf_jax.training.step import Schedule, make_update
from tests import quick

# Tokens 0 and 1 go on, 2 ends a response; one of three tokens without an end is cut.
VOCAB, STOP, LONGEST = 3, 2, 3
PREFIXES = [
  prefix for length in range(LONGEST) for prefix in itertools.product(range(STOP), repeat=length)
]
STATE = {prefix: number for number, prefix in enumerate(PREFIXES)}
RESPONSES = [
  (*prefix, token)
  for prefix in PREFIXES
  for token in range(VOCAB)
  if token == STOP or len(prefix) == LONGEST - 1
]
RNG = np.random.default_rng(3)
# How often each token follows each prefix in the data, and what each response is worth.
BEHAVIOUR = RNG.dirichlet(np.full(VOCAB, 4.0), len(PREFIXES))
WORTH = dict(zip(RESPONSES, RNG.normal(0, 1, len(RESPONSES)), strict=True))
# Copies of a response in the batch, in proportion to how likely the data has it.
COPIES = 400


def likelihood(response: tuple[int, ...]) -> float:
  return float(np.prod([BEHAVIOUR[STATE[response[:t]], a] for t, a in enumerate(response)]))


def expectile(values: np.ndarray, weights: np.ndarray, tau: float) -> float:
  """The root m of sum_i w_i |tau - 1(x_i < m)| (x_i - m), by bisection."""
  low, high = values.min(), values.max()
  for _ in range(60):
    middle = (low + high) / 2
    pull = weights * np.where(values < middle, 1 - tau, tau) * (values - middle)
    low, high = (middle, high) if pull.sum() > 0 else (low, middle)
  return float(low)


def solve(batch: Ratings, config: ILQLConfig) -> tuple[np.ndarray, np.ndarray]:
  """V `[states]` and Q `[states, VOCAB]` backwards from the ends, by the batch's frequencies."""
  counts = np.zeros((len(PREFIXES), VOCAB))
  for row, mask in zip(batch.sequences.response, batch.sequences.response_mask, strict=True):
    for t in range(mask.sum()):
      counts[STATE[tuple(row[:t])], row[t]] += 1
  values, q = np.zeros(len(PREFIXES)), np.zeros((len(PREFIXES), VOCAB))
  for prefix in reversed(PREFIXES):
    state = STATE[prefix]
    for token in range(VOCAB):
      response = (*prefix, token)
      ends = response in WORTH
      q[state, token] = WORTH[response] if ends else config.gamma * values[STATE[response]]
    values[state] = expectile(q[state], counts[state], config.expectile)
  return values, q


def make_batch() -> Ratings:
  rows = [r for r in RESPONSES for _ in range(max(1, round(COPIES * likelihood(r))))]
  lengths = np.array([len(row) for row in rows])
  tokens = np.array([row + (0,) * (LONGEST - len(row)) for row in rows], np.int32)
  ones = np.ones((len(rows), 1), np.int32)
  mask = np.arange(LONGEST) < lengths[:, None]
  score = np.array([WORTH[row] for row in rows], np.float32)
  return Ratings(Sequences(ones, ones > 0, tokens, mask), score)


def table_q(params: Any, sequences: Sequences) -> QOutput:
  """All that the heads say, looked up by the whole prefix."""
  tokens, mask = sequences.response, sequences.response_mask
  # The number of a prefix: those of all shorter ones come first.
  state, states = jnp.zeros_like(tokens[:, 0]), []
  for t in range(LONGEST):
    states.append(jnp.where(mask[:, t], state, 0))
    state = 2 * state + 1 + tokens[:, t]
  places = jnp.stack(states, axis=1)
  values = params['q_heads']['v'][places]
  after = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
  taken = [
    [jnp.take_along_axis(table[places], tokens[..., None], -1)[..., 0] for table in tables]
    for tables in (params['q_heads']['q'], params['q_target']['q'])
  ]
  logits = [params['policy'], *params['q_heads']['q']]
  logprobs = [token_logprobs(table[places], tokens) for table in logits]
  return QOutput(
    logprobs=logprobs[0],
    values=values,
    next_values=jnp.where(after, jnp.pad(values[:, 1:], ((0, 0), (0, 1))), 0.0),
    q=jnp.stack(taken[0]),
    target_q=jnp.minimum(*taken[1]),
    q_nll=-jnp.stack(logprobs[1:]),
  )


def learn(config: ILQLConfig, batch: Ratings, steps: int) -> Any:
  """Params by role after full-batch updates from random tables, slow copies included."""
  rng = np.random.default_rng(5)

  def table(*shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(0, 1, shape), jnp.float32)

  states = len(PREFIXES)
  params = {
    'policy': table(states, VOCAB),
    'q_heads': {'v': table(states), 'q': table(2, states, VOCAB)},
  }
  targets = {'q_target': {'q': table(2, states, VOCAB)}}

  def move(slow: Any, params: Any) -> Any:
    new = {'q_target': {'q': params['q_heads']['q']}}
    return jax.tree.map(lambda a, b: a + config.target_rate * (b - a), slow, new)

  rate = optax.linear_schedule(0.05, 0.0, steps)
  optimizer = optax.adam(rate)

  def loss(params: Any, batch: Any, key: jax.Array) -> Any:
    del key
    return ilql.loss(config, Actors(q=table_q), params, batch)

  update = make_update(loss, optimizer, rate, Schedule(), move)

  @quick.jit
  def run(state: TrainState) -> TrainState:
    return jax.lax.scan(lambda s, _: (update(s, batch)[0], None), state, None, steps)[0]

  return run(TrainState.create(params, optimizer, 0, {}, targets)).by_role


def test_numbers_of_states() -> None:
  """The order that `table_q` counts in is that of `PREFIXES`."""
  assert [STATE[p] for p in [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]] == list(range(7))


@pytest.mark.parametrize(('tau', 'gamma'), [(0.5, 1.0), (0.7, 0.9), (0.95, 1.0)])
def test_q_and_v_are_those_of_dynamic_programming(tau: float, gamma: float) -> None:
  """Both Q at every token that the data has, their slow copies, and V at every prefix.

  The rewards of the ends, cut responses among them, have come back through all tokens. With a high
  expectile the greedy tilt writes the best response of all.
  """
  config = ILQLConfig(expectile=tau, gamma=gamma, cql_coefficient=0.0, target_rate=0.1)
  batch = make_batch()
  values, q = solve(batch, config)
  found = learn(config, batch, 1500)
  np.testing.assert_allclose(found['q_heads']['v'], values, atol=5e-3)
  np.testing.assert_allclose(found['q_heads']['q'], np.stack([q, q]), atol=5e-3)
  np.testing.assert_allclose(found['q_target']['q'], np.stack([q, q]), atol=5e-3)
  if tau == 0.95:
    response: tuple[int, ...] = ()
    while response not in WORTH:
      response = (*response, int(found['q_target']['q'][:, STATE[response]].min(0).argmax()))
    assert response == max(RESPONSES, key=lambda response: WORTH[response])
