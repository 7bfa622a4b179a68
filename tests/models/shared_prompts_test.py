"""Responses behind one copy of their prompt are read as if each had its own."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.types import Sequences
from rlhf_jax.models import adapters, decoder, roles
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import scalar_head_init
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh, put_batch
from rlhf_jax.sharding.rules import param_shardings
from tests.experiments.programs import ROOT
from tests.models.architectures import VOCAB, make_config, make_params

# Wider than the windows of the architectures, so that responses see a part of their prompt only.
P, R, K = 5, 6, 3
# Real tokens of each row's prompt, and of its responses: padding on both sides, and none.
LENGTHS = ((5, (6, 2, 4)), (2, (1, 6, 0)))


def make_shared(rows: int = 2, responses: int = R) -> Sequences:
  """Rows of one prompt and K responses; what lies under the padding is arbitrary."""
  rng = np.random.default_rng(0)
  prompts, answers = zip(*(LENGTHS[row % len(LENGTHS)] for row in range(rows)), strict=True)
  return Sequences(
    prompt=jnp.asarray(rng.integers(0, VOCAB, (rows, 1, P)), jnp.int32),
    prompt_mask=jnp.arange(P) >= P - jnp.asarray(prompts)[:, None, None],
    response=jnp.asarray(rng.integers(0, VOCAB, (rows, K, responses)), jnp.int32),
    response_mask=jnp.arange(responses) < jnp.asarray(answers)[..., None],
  )


def apart(sequences: Sequences) -> Sequences:
  """Each response as a row of its own, with a copy of its prompt."""
  count = sequences.response.shape[1]
  return jax.tree.map(
    lambda x: jnp.repeat(x, count // x.shape[1], axis=1).reshape(-1, x.shape[-1]), sequences
  )


def both(read: Callable[[Any, Sequences], Any], params: Any, sequences: Sequences) -> Any:
  """Values and gradients of what is read of rows that share prompts, and of rows apart."""

  def total(params: Any, rows: Sequences) -> Any:
    mask = rows.response_mask
    values = [x.reshape(mask.shape) for x in read(params, rows)]
    values = [jnp.where(mask, x, 0) for x in values]
    weights = jnp.cos(jnp.arange(mask.size)).reshape(mask.shape)
    return sum((weights * x).sum() for x in values), values

  one = jax.jit(jax.value_and_grad(total, has_aux=True))
  (_, shared), gradients = one(params, sequences)
  (_, separate), expected = one(params, apart(sequences))
  for a, b in zip(shared, separate, strict=True):
    np.testing.assert_allclose(a, b.reshape(a.shape), atol=2e-5)
  return gradients, expected


def assert_close(gradients: Any, expected: Any) -> None:
  """To float error, against the largest number of each array."""

  def check(a: jax.Array, b: jax.Array) -> None:
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a, b, atol=1e-6 + 1e-5 * float(jnp.abs(b).max(initial=0.0)))

  jax.tree.map(check, gradients, expected)


def policy_reader(config: ModelConfig, head: Any) -> Callable[[Any, Sequences], Any]:
  def read(params: Any, rows: Sequences) -> Any:
    output = roles.policy_output(config, params, rows, temperature=0.7, value_head=head)
    return output.logprobs, output.entropy, output.values

  return read


@pytest.mark.parametrize(
  ('name', 'changes'),
  [
    ('gpt2', dict(layers=1)),
    ('gemma3', dict(scan_layers=True, remat='full')),
    ('qwen3', dict(layers=1, remat='dots', vocab_chunk=7)),
    pytest.param('gemma2', {}, marks=pytest.mark.slow),
    pytest.param('llama3', dict(scan_layers=True), marks=pytest.mark.slow),
    pytest.param('post', {}, marks=pytest.mark.slow),
  ],
)
def test_a_policy_reads_them_as_separate_rows(name: str, changes: Any) -> None:
  """Log-probs, entropies and values, and all gradients."""
  config = make_config(name, **changes)
  head = scalar_head_init(jax.random.key(5), config.width, 'normal')
  assert_close(*both(policy_reader(config, head), make_params(config), make_shared()))


@pytest.mark.slow
def test_a_policy_with_low_rank_matrices_does_too() -> None:
  """Gradients of the matrices alone."""
  config = make_config('qwen2')
  adapter = AdapterConfig(method='lora', rank=2, targets=('*',))
  base = make_params(config)
  lora = adapters.init(adapter, config, base, jax.random.key(0))
  lora = jax.tree.map(lambda x: x + 0.1, lora)
  frozen = adapters.frozen_of(adapter, config, base)
  read = policy_reader(config, scalar_head_init(jax.random.key(5), config.width, 'normal'))

  def of_part(part: Any, rows: Sequences) -> Any:
    whole = adapters.join({'policy': frozen}, {'policy': part})
    return read(whole['policy'], rows)

  assert_close(*both(of_part, lora, make_shared()))


@pytest.mark.parametrize('responses', [R, 1])
def test_rewards_are_read_at_the_end_of_each_response(responses: int) -> None:
  """An empty response at the end of the prompt that it shares; gradients too."""
  config = make_config('mistral', layers=1)
  params = roles.reward_model_from_trunk(config, make_params(config), jax.random.key(4))
  sequences = make_shared(responses=responses)

  def total(params: Any, rows: Sequences) -> Any:
    scores = roles.reward_score(config, params, rows)
    return (jnp.arange(2.0 * K) * scores.ravel()).sum(), scores

  one = jax.jit(jax.value_and_grad(total, has_aux=True))
  (_, shared), gradients = one(params, sequences)
  (_, separate), expected = one(params, apart(sequences))
  assert shared.shape == (2, K)
  np.testing.assert_allclose(shared.ravel(), separate, atol=2e-5)
  assert_close(gradients, expected)


def test_responses_of_one_token_are_predicted_from_the_prompt_alone() -> None:
  """No response column is read at all."""
  config = make_config(layers=1)
  head = scalar_head_init(jax.random.key(5), config.width, 'normal')
  read = policy_reader(config, head)
  assert_close(*both(read, make_params(config), make_shared(responses=1)))


# Compiled as for users: the tests go without optimisations.
LONG_GRADIENT = """
import jax, jax.numpy as jnp
from rlhf_jax.models import attending
from rlhf_jax.models.config import ModelConfig

def causal(rows, queries, keys):
  seen = jnp.arange(keys) <= jnp.arange(keys - queries, keys)[:, None]
  return jnp.broadcast_to(seen, (rows, queries, keys))

def loss(query, key, value):
  branches = attending.Branches(causal(4, 256, 320), jnp.ones((4, 320), bool))
  mixed = attending.attend_branches(
    ModelConfig(width=256, heads=4, layers=1), query, key, value, mask=causal(2, 64, 64),
    real=jnp.ones((2, 64), bool), branches=branches, window=None,
  )
  return (mixed**2).sum()

heads = jnp.ones((2, 4, 64 + 2 * 256, 64))
for gradient in jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(heads, heads, heads):
  print(gradient.shape, bool(jnp.isfinite(gradient).all()))
"""


def test_the_gradient_of_long_responses_is_a_sound_program() -> None:
  """Not one that crashes, as XLA once made of it (see `attend_branches`)."""
  environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
  command = [sys.executable, '-c', LONG_GRADIENT]
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout == '(2, 4, 576, 64) True\n' * 3


def test_no_response_sees_another() -> None:
  """Changing a response changes nothing of what is said of its neighbours."""
  config, sequences = make_config(layers=1), make_shared()
  params = make_params(config)
  output = jax.jit(lambda rows: roles.policy_output(config, params, rows, temperature=1.0).logprobs)
  other = sequences.response.at[:, 1].set((sequences.response[:, 1] + 1) % VOCAB)
  before = output(sequences)
  after = output(dataclasses.replace(sequences, response=other))
  np.testing.assert_array_equal(before[:, [0, 2]], after[:, [0, 2]])
  assert np.any(before[0, 1] != after[0, 1])


@pytest.mark.slow
@pytest.mark.parametrize('name', ['qwen2', 'gemma3'])
def test_on_a_mesh_of_all_axes_they_are_the_same(name: str) -> None:
  """Loss and gradients of rows apart on one device."""
  config = make_config(name, vocab_multiple=2)
  params, sequences = make_params(config), make_shared(8)

  def loss(params: Any, rows: Sequences) -> jax.Array:
    logprobs = roles.policy_output(config, params, rows, temperature=1.0).logprobs
    return jnp.where(rows.response_mask, logprobs, 0).sum()

  expected_loss, expected = jax.jit(jax.value_and_grad(loss))(params, apart(sequences))
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  shardings = param_shardings(decoder.logical_axes(config), params, mesh)
  with jax.set_mesh(mesh):
    value, gradients = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))(
      jax.device_put(params, shardings), put_batch(sequences, mesh)
    )
  np.testing.assert_allclose(value, expected_loss, rtol=1e-6)
  assert_close(jax.device_get(gradients), expected)
