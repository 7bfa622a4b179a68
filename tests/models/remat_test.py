"""What is kept for the backward pass, and in which precision things are computed."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.types import Sequences
from rlhf_jax.models import decoder, roles
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.training.optimizer import OptimizerConfig, make_optimizer
from tests.models.architectures import make_config, make_params, make_tokens

B, T = 2, 64


def saved(config: ModelConfig) -> dict[tuple[int, ...], int]:
  """How many arrays of each shape the backward pass of the decoder gets from the forward pass."""
  params = make_params(config)
  tokens = make_tokens(B, T)

  def total(params: Any) -> jax.Array:
    return decoder.hidden_states(config, params, tokens, jnp.ones((B, T), bool))[0].sum()

  residuals = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(total, p)[1], params))
  counts: dict[tuple[int, ...], int] = {}
  for leaf in residuals:
    counts[leaf.shape] = counts.get(leaf.shape, 0) + 1
  return counts


def test_remat_policies_keep_what_they_say() -> None:
  """'none' keeps attention weights, 'dots' products with parameters, 'full' a block's input."""
  shapes = {remat: saved(make_config(remat=remat)) for remat in ('none', 'dots', 'full')}
  scores, products = (B, 4, 1, T, T), [(B, T, 24), (4, 4, B, T)]  # the MLP's, and queries'
  assert scores in shapes['none']
  assert scores not in shapes['dots'] and all(shape in shapes['dots'] for shape in products)
  assert scores not in shapes['full'] and not any(shape in shapes['full'] for shape in products)
  assert shapes['full'][B, T, 16] < shapes['dots'][B, T, 16] <= shapes['none'][B, T, 16]


@pytest.mark.slow
def test_compiled_programs_need_less_memory_the_more_is_recomputed() -> None:
  """The compiler does not undo it: temporaries of 'none' > 'dots' > 'full'.

  Scanned, since XLA's CPU backend drops the barriers that protect unrolled layers.
  """

  def temporaries(remat: str) -> int:
    config = make_config(layers=6, remat=remat, scan_layers=True)
    tokens, mask = make_tokens(B, T), jnp.ones((B, T), bool)

    def total(params: Any) -> jax.Array:
      return decoder.hidden_states(config, params, tokens, mask)[0].sum()

    compiled: Any = jax.jit(jax.grad(total)).lower(make_params(config)).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)

  none, dots, full = (temporaries(remat) for remat in ('none', 'dots', 'full'))
  assert none > 1.5 * dots and dots > 1.2 * full, (none, dots, full)


@pytest.mark.parametrize('memory', [{}, dict(vocab_chunk=7, remat='dots', scan_layers=True)])
@pytest.mark.parametrize('name', ['default', 'gemma2'])
def test_masters_gradients_and_moments_are_float32_whatever_is_computed_in(
  name: str, memory: dict[str, Any]
) -> None:
  """bfloat16 is for activations alone; so are log-probs, entropies, losses and rewards float32."""
  config = make_config(name, dtype='bfloat16', **memory)
  params = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
  reward = jax.eval_shape(lambda: roles.init_reward_model(config, jax.random.key(0)))
  ones = jnp.ones((B, 5), bool)
  sequences = Sequences(
    prompt=make_tokens(B, 5), prompt_mask=ones, response=make_tokens(B, 5), response_mask=ones
  )
  optimizer = make_optimizer(OptimizerConfig(weight_decay=0.1), 10)

  def step(params: Any) -> Any:
    def loss(params: Any) -> Any:
      output = roles.policy_output(config, params, sequences, temperature=1.0)
      return output.logprobs.sum() + output.entropy.sum(), output

    (value, output), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return value, output, gradients, optimizer.update(gradients, optimizer.init(params), params)

  scores = functools.partial(roles.reward_score, config, sequences=sequences)
  results = jax.eval_shape(step, params), jax.eval_shape(scores, reward)
  kinds = {leaf.dtype for leaf in jax.tree.leaves((params, reward, results))}
  assert kinds == {np.dtype('float32'), np.dtype('int32')}  # integers: the optimizer's count
  states = jax.eval_shape(lambda p: roles.response_states(config, p, sequences), params)
  assert states.dtype == jnp.bfloat16
