"""Heads for offline Q-learning, against a NumPy forward pass on the decoder's hidden states."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.types import Sequences
from rlhf_jax.models import decoder, q_heads
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.roles import response_states
from tests import quick

MODEL = ModelConfig(
  vocab_size=13, width=8, layers=1, heads=2, mlp_width=16, vocab_multiple=8, max_length=16
)
PARAMS = decoder.init(MODEL, jax.random.key(0))


def trained_heads(seed: int) -> Any:
  """Heads that say something: new ones say 0."""
  rng = np.random.default_rng(seed)
  heads = q_heads.q_heads_init(MODEL, jax.random.key(seed))
  return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), heads)


HEADS, TARGET = trained_heads(1), q_heads.target_of(trained_heads(2))
B, P, R = 4, 3, 5
LENGTHS = np.array([5, 1, 3, 2])


def make_sequences() -> Sequences:
  rng = np.random.default_rng(0)
  return Sequences(
    prompt=jnp.asarray(rng.integers(0, 13, (B, P))),
    prompt_mask=jnp.asarray(np.arange(P) >= np.array([0, 1, 2, 0])[:, None]),
    response=jnp.asarray(rng.integers(0, 13, (B, R))),
    response_mask=jnp.asarray(np.arange(R) < LENGTHS[:, None]),
  )


def slow_head(params: Any, hidden: np.ndarray) -> np.ndarray:
  """Two layers in float64."""
  hidden_layer, out = (
    {name: np.asarray(x, np.float64) for name, x in params[layer].items()}
    for layer in ('hidden', 'out')
  )
  units = np.maximum(hidden @ hidden_layer['kernel'] + hidden_layer['bias'], 0)
  return units @ out['kernel'] + out['bias']


def log_softmax(logits: np.ndarray) -> np.ndarray:
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.fixture(scope='module')
def hidden() -> np.ndarray:
  states = quick.jit(lambda params, rows: response_states(MODEL, params, rows))
  return np.asarray(states(PARAMS, make_sequences()), np.float64)


run = quick.jit(
  lambda params, heads, target, rows: q_heads.q_output(MODEL, params, heads, target, rows)
)


def test_the_output_equals_a_slow_one(hidden: np.ndarray) -> None:
  """Row by row, token by token; the state after the last token is worth 0."""
  sequences = make_sequences()
  found: Any = run(PARAMS, HEADS, TARGET, sequences)
  policy_logits = np.asarray(decoder.logits(MODEL, PARAMS, jnp.asarray(hidden, jnp.float32)))
  q = [slow_head(HEADS[name], hidden)[..., :13] for name in ('q1', 'q2')]
  slow = [slow_head(TARGET[name], hidden)[..., :13] for name in ('q1', 'q2')]
  values = slow_head(HEADS['v'], hidden)[..., 0]
  for b in range(B):
    for t in range(LENGTHS[b]):
      token = int(sequences.response[b, t])
      following = values[b, t + 1] if t + 1 < LENGTHS[b] else 0.0
      expected = {
        'values': values[b, t],
        'next_values': following,
        'target_q': min(table[b, t, token] for table in slow),
        'logprobs': log_softmax(policy_logits[b, t])[token],
      }
      for name, value in expected.items():
        assert getattr(found, name)[b, t] == pytest.approx(value, rel=1e-4, abs=1e-5), name
      for head in range(2):
        assert found.q[head, b, t] == pytest.approx(q[head][b, t, token], rel=1e-4, abs=1e-5)
        nll = -log_softmax(q[head][b, t])[token]
        assert found.q_nll[head, b, t] == pytest.approx(nll, rel=1e-4, abs=1e-5)
  assert found.q.shape == found.q_nll.shape == (2, B, R)
  np.testing.assert_array_equal(
    np.asarray(found.next_values)[~(np.arange(R) < LENGTHS[:, None])], 0
  )


def test_chunks_of_the_vocabulary_change_nothing() -> None:
  """Outputs and gradients by policy and heads, of everything that is learned from them."""

  def total(model: ModelConfig, params: Any, heads: Any) -> Any:
    found: Any = q_heads.q_output(model, params, heads, TARGET, make_sequences())
    parts = (found.logprobs, found.q[0], 2 * found.q[1], found.q_nll[0], 3 * found.q_nll[1])
    return sum(jnp.where(make_sequences().response_mask, x, 0.0).sum() for x in parts), found

  whole, chunked = (
    quick.jit(jax.value_and_grad(functools.partial(total, model), (0, 1), has_aux=True))(
      PARAMS, HEADS
    )
    for model in (MODEL, dataclasses.replace(MODEL, vocab_chunk=6))
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, chunked)


def test_targets_get_no_gradient() -> None:
  """Neither the slow copies, nor the policy or the heads through them; all else moves them."""

  def slopes(name: str) -> Any:
    def total(params: Any, heads: Any, target: Any) -> Any:
      found = getattr(q_heads.q_output(MODEL, params, heads, target, make_sequences()), name)
      return jnp.where(make_sequences().response_mask, found, 0.0).sum()

    gradients = quick.jit(jax.grad(total, argnums=(0, 1, 2)))(PARAMS, HEADS, TARGET)
    return [any(bool(jnp.any(x)) for x in jax.tree.leaves(tree)) for tree in gradients]

  assert slopes('target_q') == [False, False, False]
  for name in ('q', 'q_nll', 'values', 'next_values'):
    assert slopes(name) == [True, True, False], name
  assert slopes('logprobs') == [True, False, False]


def test_tilted_logits_by_hand(hidden: np.ndarray) -> None:
  """log pi + beta (min of the slow Qs - V) at every token; beta 0 is the policy itself."""
  states = jnp.asarray(hidden, jnp.float32)
  tilted = quick.jit(lambda beta: q_heads.tilted_logits(MODEL, PARAMS, HEADS, TARGET, beta, states))
  logprobs = log_softmax(np.asarray(decoder.logits(MODEL, PARAMS, states), np.float64))
  q = np.minimum(*(slow_head(TARGET[name], hidden)[..., :13] for name in ('q1', 'q2')))
  expected = logprobs + 2.5 * (q - slow_head(HEADS['v'], hidden))
  assert tilted(2.5).shape == (B, R, 13)
  np.testing.assert_allclose(tilted(2.5), expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(tilted(0.0), logprobs, rtol=1e-5, atol=1e-5)


def test_what_is_masked_is_not_read() -> None:
  """Tokens behind the end and before the prompt change nothing that is real."""
  sequences = make_sequences()
  dirty = sequences.replace(  # type: ignore[attr-defined]
    prompt=jnp.where(sequences.prompt_mask, sequences.prompt, 12),
    response=jnp.where(sequences.response_mask, sequences.response, 12),
  )
  mask = np.asarray(sequences.response_mask)
  for clean, other in zip(
    jax.tree.leaves(run(PARAMS, HEADS, TARGET, sequences)),
    jax.tree.leaves(run(PARAMS, HEADS, TARGET, dirty)),
    strict=True,
  ):
    np.testing.assert_allclose(
      np.where(mask, clean, 0), np.where(mask, other, 0), rtol=1e-5, atol=1e-6
    )


def test_heads_have_axes_and_a_slow_part() -> None:
  """An axis name for each axis; the slow copies are both Q and not V."""
  axes = q_heads.q_heads_axes()
  shapes = jax.tree.map(lambda x: x.ndim, HEADS)
  counts = jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple))
  assert shapes == counts
  assert set(q_heads.target_of(HEADS)) == {'q1', 'q2'}
  assert HEADS['q1']['out']['kernel'].shape == (16, 16)  # 13 tokens, rounded up
  assert axes['q1']['out']['kernel'][-1] == 'vocab' and axes['v']['out']['kernel'][-1] is None


def test_new_heads_say_nothing() -> None:
  """All values are 0, so that nothing is tilted; the two Q still learn apart."""
  wide = ModelConfig(vocab_size=500, width=200, layers=1, heads=2, mlp_width=16)
  heads = q_heads.q_heads_init(wide, jax.random.key(0))
  for head in heads.values():
    assert not head['out']['kernel'].any()
    assert not head['hidden']['bias'].any() and not head['out']['bias'].any()
    # He normal: the units have the scale of the states.
    assert float(head['hidden']['kernel'].std()) == pytest.approx((2 / 200) ** 0.5, rel=0.02)
  kernels = [heads[name]['hidden']['kernel'] for name in ('v', 'q1', 'q2')]
  assert not np.array_equal(kernels[1], kernels[2])
  assert not np.array_equal(kernels[0], kernels[1])
