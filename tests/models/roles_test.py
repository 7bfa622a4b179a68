"""Policies, value functions and reward models against the same sums written out."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.types import Sequences
from rlhf_jax.models import roles
from rlhf_jax.models.heads import scalar_head_init
from tests.models import reference
from tests.models.architectures import VOCAB, make_config, make_params, make_tokens
from tests.models.logits import response_logits

P, R = 5, 6
LENGTHS = ((4, 6), (2, 3), (5, 1))  # real tokens of each row's prompt and response


def make_sequences() -> Sequences:
  """Three rows of different lengths; what lies under the padding is arbitrary."""
  prompt_lengths, response_lengths = (jnp.asarray(x)[:, None] for x in zip(*LENGTHS, strict=True))
  return Sequences(
    prompt=make_tokens(3, P),
    prompt_mask=jnp.arange(P) >= P - prompt_lengths,
    response=make_tokens(3, R, seed=3),
    response_mask=jnp.arange(R) < response_lengths,
  )


def row_tokens(sequences: Sequences, row: int) -> tuple[np.ndarray, int]:
  """The real tokens of a row, `[T]`, and how many of them are its prompt."""
  prompt = np.asarray(sequences.prompt[row])[np.asarray(sequences.prompt_mask[row])]
  response = np.asarray(sequences.response[row])[np.asarray(sequences.response_mask[row])]
  return np.concatenate([prompt, response]), len(prompt)


def widen(params: Any) -> Any:
  """Parameters for the float64 reference."""
  return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def slow_head(head: Any, config: Any, params: Any, tokens: np.ndarray) -> np.ndarray:
  """A head's read-out `[T]` of one row without padding, by the float64 reference."""
  hidden = reference.hidden_states(config, widen(params), tokens)
  return hidden @ np.asarray(head['kernel'][:, 0]) + np.asarray(head['bias'])


@pytest.mark.parametrize(
  ('temperature', 'memory'),
  [(1.0, {}), (0.7, dict(remat='full')), (0.7, dict(vocab_chunk=7))],
)
def test_logprobs_and_entropy_are_those_of_each_row_alone(temperature: float, memory: Any) -> None:
  """log softmax(logits / temperature) at each response token, a row at a time without padding."""
  config, sequences = make_config(**memory), make_sequences()
  params = make_params(config)
  output = jax.jit(lambda p, s: roles.policy_output(config, p, s, temperature=temperature))(
    params, sequences
  )
  logits = jax.jit(lambda p, s: response_logits(config, p, s, temperature))(params, sequences)
  assert logits.shape == (3, R, VOCAB) and output.values is None
  for row, (_, length) in enumerate(LENGTHS):
    tokens, prompt = row_tokens(sequences, row)
    scores = reference.logits(config, widen(params), tokens)[prompt - 1 : -1] / temperature
    expected = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    chosen = expected[np.arange(length), tokens[prompt:]]
    np.testing.assert_allclose(output.logprobs[row, :length], chosen, atol=1e-5)
    entropies = -(np.exp(expected) * expected).sum(-1)
    np.testing.assert_allclose(output.entropy[row, :length], entropies, atol=1e-5)
    np.testing.assert_allclose(logits[row, :length], scores, atol=1e-5)


def test_values_are_read_before_the_token_they_speak_of() -> None:
  """values[t] sees the prompt and the response up to t - 1, on the policy's trunk."""
  config, sequences = make_config(), make_sequences()
  params, head = make_params(config), scalar_head_init(jax.random.key(5), 16, 'normal')
  output = jax.jit(
    lambda p: roles.policy_output(config, p, sequences, temperature=1.0, value_head=head)
  )(params)
  assert output.values is not None
  for row, (_, length) in enumerate(LENGTHS):
    tokens, prompt = row_tokens(sequences, row)
    values = slow_head(head, config, params, tokens)
    np.testing.assert_allclose(output.values[row, :length], values[prompt - 1 : -1], atol=1e-5)


def test_a_value_trunk_of_its_own_may_be_another_decoder() -> None:
  """Values come from the value trunk alone, in its own architecture; log-probs from the policy."""
  config, other = make_config(), make_config(width=32, layers=1)
  sequences = make_sequences()
  params, trunk = make_params(config), make_params(other, seed=9)
  head = scalar_head_init(jax.random.key(5), 32, 'normal')

  def output(params: Any, trunk: Any) -> Any:
    return roles.policy_output(
      config,
      params,
      sequences,
      temperature=1.0,
      value_head=head,
      value_trunk=trunk,
      value_config=other,
    )

  def value_total(params: Any, trunk: Any) -> Any:
    values = output(params, trunk).values
    return values.sum(), values

  gradients, values = jax.jit(jax.grad(value_total, argnums=(0, 1), has_aux=True))(params, trunk)
  for row, (_, length) in enumerate(LENGTHS):
    tokens, prompt = row_tokens(sequences, row)
    expected = slow_head(head, other, trunk, tokens)[prompt - 1 : -1]
    np.testing.assert_allclose(values[row, :length], expected, atol=1e-5)
  gradient, trunk_gradient = gradients
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
  assert np.any(trunk_gradient['layers']['query']['kernel'])


@functools.partial(jax.jit, static_argnames='normalize')
def score(params: Any, sequences: Sequences, normalize: bool = True) -> jax.Array:
  """The default decoder's `roles.reward_score`, compiled once for all tests."""
  return roles.reward_score(make_config(), params, sequences, normalize=normalize)


def reward_model(config: Any) -> Any:
  """A reward model with random parameters and a normaliser that shows."""
  params = roles.reward_model_from_trunk(config, make_params(config), jax.random.key(4))
  return params | {'normalizer': {'gain': jnp.float32(2.0), 'bias': jnp.float32(-0.5)}}


def test_rewards_are_read_at_the_last_real_token() -> None:
  """gain * head + bias there; without normalisation the head alone."""
  config, sequences = make_config(), make_sequences()
  params = reward_model(config)
  raw = score(params, sequences, normalize=False)
  for row in range(3):
    tokens, _ = row_tokens(sequences, row)
    expected = slow_head(params['head'], config, params['trunk'], tokens)[-1]
    np.testing.assert_allclose(raw[row], expected, atol=1e-5)
  normalized = score(params, sequences)
  assert normalized.dtype == jnp.float32
  np.testing.assert_allclose(normalized, 2.0 * raw - 0.5, atol=1e-6)


def test_an_empty_response_is_scored_at_the_end_of_its_prompt() -> None:
  """Padding is never read, not even when there is nothing else."""
  config, sequences = make_config(), make_sequences()
  params = reward_model(config)
  empty = dataclasses.replace(sequences, response_mask=jnp.zeros_like(sequences.response_mask))
  other = dataclasses.replace(empty, response=(empty.response + 1) % VOCAB)
  scores = score(params, empty)
  np.testing.assert_array_equal(scores, score(params, other))
  tokens, _ = row_tokens(empty, 0)
  expected = slow_head(params['head'], config, params['trunk'], tokens)[-1]
  np.testing.assert_allclose(scores[0], 2.0 * expected - 0.5, atol=1e-5)


def test_the_normalizer_has_no_gradient() -> None:
  """Gain and bias are set from samples; the head and the trunk learn."""
  config, sequences = make_config(), make_sequences()

  def total(params: Any) -> jax.Array:
    return score(params, sequences).sum()

  gradient = jax.jit(jax.grad(total))(reward_model(config))
  assert gradient['normalizer'] == {'gain': 0.0, 'bias': 0.0}
  np.testing.assert_allclose(gradient['head']['bias'], [6.0])
  assert np.any(gradient['trunk']['embedding'])


def test_a_new_reward_model_changes_nothing_by_normalising() -> None:
  """Gain 1 and bias 0; every parameter's axes are named."""
  config = make_config()
  shapes = jax.eval_shape(lambda key: roles.init_reward_model(config, key), jax.random.key(0))
  axes = roles.reward_model_axes(config)
  ranks = jax.tree.map(lambda leaf: len(leaf.shape), shapes)
  assert ranks == jax.tree.map(len, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
  params = roles.reward_model_from_trunk(config, make_params(config), jax.random.key(0))
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
  sequences = make_sequences()
  np.testing.assert_array_equal(
    score(params, sequences),
    score(params, sequences, normalize=False),
  )


@pytest.mark.parametrize('temperature', [0.0, -1.0, float('nan')])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
  """Log-probs at temperature 0 do not exist."""
  config = make_config()
  for function in (
    lambda: roles.policy_output(config, {}, make_sequences(), temperature=temperature),
    lambda: roles.response_kl(config, {}, {}, make_sequences(), temperature),
  ):
    with pytest.raises(ValueError, match='temperature'):
      function()
