"""Meshes change where the decoder is computed, not what."""

import functools
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.types import Prompts, Sequences
from rlhf_jax.generation.config import GenerationConfig
from rlhf_jax.generation.sample import Samples, generate
from rlhf_jax.models import decoder, roles
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.planning import hlo
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh, put_batch
from rlhf_jax.sharding.rules import param_shardings
from tests.models.architectures import make_config, make_params, make_tokens

pytestmark = pytest.mark.slow

MESHES = {
  'data': MeshConfig(data=8),
  'all': MeshConfig(data=2, fsdp=2, tensor=2),
  'fsdp-tensor': MeshConfig(data=1, fsdp=4, tensor=2),
}
P, R = 4, 5
# Most kinds of parameters; 19 ids rounded up to 20, so that two tensor shards share them.
KIND: dict[str, Any] = dict(layers=1, qk_norm=True, vocab_multiple=2, window=4)
CONFIG = make_config('qwen2', **KIND)


def make_sequences() -> Sequences:
  """Eight rows, padded differently."""
  start, end = np.arange(8)[:, None] % P, 1 + np.arange(8)[:, None] % R
  return Sequences(
    prompt=make_tokens(8, P),
    prompt_mask=jnp.arange(P) >= start,
    response=make_tokens(8, R, seed=3),
    response_mask=jnp.arange(R) < end,
  )


def loss(config: ModelConfig, params: Any, sequences: Sequences) -> jax.Array:
  """Minus the mean log-prob of the response tokens."""
  output = roles.policy_output(config, params, sequences, temperature=1.0)
  mask = sequences.response_mask
  return -jnp.where(mask, output.logprobs, 0.0).sum() / mask.sum()


@functools.cache
def single_device() -> Any:
  """Parameters, loss and gradients on one device."""
  params = make_params(CONFIG)
  value, gradients = jax.jit(jax.value_and_grad(functools.partial(loss, CONFIG)))(
    params, make_sequences()
  )
  return jax.device_get((params, value, gradients))


@pytest.mark.parametrize('name', MESHES)
def test_loss_and_gradients_do_not_depend_on_the_mesh(name: str) -> None:
  """Equal to float error; gradients lie where their parameters do."""
  mesh = make_mesh(MESHES[name])
  params, expected_loss, expected_gradients = single_device()
  shardings = param_shardings(decoder.logical_axes(CONFIG), params, mesh)
  with jax.set_mesh(mesh):
    step = jax.value_and_grad(functools.partial(loss, CONFIG))
    value, gradients = jax.jit(step, out_shardings=(None, shardings))(
      jax.device_put(params, shardings), put_batch(make_sequences(), mesh)
    )
  assert jax.tree.map(lambda leaf: leaf.sharding, gradients) == shardings
  np.testing.assert_allclose(value, expected_loss, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5),
    gradients,
    expected_gradients,
  )


COMPILE = """
import functools, jax
jax.config.update('jax_num_cpu_devices', 8)
from tests.models import sharded_decoder_test as test
mesh = test.make_mesh(test.MESHES['all'])
for positions in ('rotary', 'learned'):
  config = test.make_config('qwen2', **test.KIND, positions=positions, max_length=11)
  params = test.make_params(config)
  shardings = test.param_shardings(test.decoder.logical_axes(config), params, mesh)
  with jax.set_mesh(mesh):
    jax.jit(
      jax.value_and_grad(functools.partial(test.loss, config)), out_shardings=(None, shardings)
    ).lower(
      jax.device_put(params, shardings), test.put_batch(test.make_sequences(), mesh)
    ).compile()
"""


def test_the_compiler_finds_a_way_from_every_sharding_to_the_next() -> None:
  """Where it does not, XLA copies a whole array to every device and warns of it.

  Tables cut over fsdp, looked up for a batch cut over fsdp, made it do so. In a process of its own,
  since a program taken from the cache warns of nothing.
  """
  environment = {k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'}
  done = subprocess.run(
    [sys.executable, '-c', COMPILE],
    cwd=pathlib.Path(__file__).resolve().parents[2],
    env=environment | {'JAX_PLATFORMS': 'cpu', 'TF_CPP_MIN_LOG_LEVEL': '0'},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  assert 'rematerialization' not in done.stderr


def test_parameters_are_made_in_place() -> None:
  """Initialised on a mesh they are the same bits, each where its rules say."""
  mesh = make_mesh(MESHES['all'])
  config = make_config(layers=1, gated_mlp=False, tied_embeddings=True, vocab_multiple=2)
  expected = jax.jit(lambda key: decoder.init(config, key))(jax.random.key(0))
  shardings = param_shardings(decoder.logical_axes(config), expected, mesh)
  with jax.set_mesh(mesh):
    init = jax.jit(lambda key: decoder.init(config, key), out_shardings=shardings)
    params = init(jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings


def test_scanned_and_rematerialised_layers_on_a_mesh() -> None:
  """The other way to run the layers gives the same there."""
  config = make_config('qwen2', **KIND, scan_layers=True, remat='full')
  mesh = make_mesh(MESHES['all'])
  params, expected_loss, expected_gradients = single_device()
  shardings = param_shardings(decoder.logical_axes(config), params, mesh)
  with jax.set_mesh(mesh):
    value, gradients = jax.jit(jax.value_and_grad(functools.partial(loss, config)))(
      jax.device_put(params, shardings), put_batch(make_sequences(), mesh)
    )
  np.testing.assert_allclose(value, expected_loss, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5),
    gradients,
    expected_gradients,
  )


def sample(config: ModelConfig, weights: str, params: Any, prompts: Prompts) -> Samples:
  """A response to each prompt."""
  return generate(
    config,
    params,
    prompts,
    jax.random.key(7),
    config=GenerationConfig(temperature=0.7, top_k=9, weights=weights),
    max_new_tokens=R,
    eos_id=3,
    pad_id=0,
  )


def make_prompts() -> Prompts:
  """Those of the sequences."""
  sequences = make_sequences()
  return Prompts(
    tokens=sequences.prompt, mask=sequences.prompt_mask, index=jnp.arange(8, dtype=jnp.int32)
  )


def assert_same_samples(actual: Samples, expected: Samples) -> None:
  """The same tokens, their log-probs to float error."""
  np.testing.assert_array_equal(actual.tokens, expected.tokens)
  np.testing.assert_array_equal(actual.mask, expected.mask)
  np.testing.assert_allclose(actual.logprobs, expected.logprobs, atol=1e-5)


def test_samples_do_not_depend_on_the_mesh() -> None:
  """With parameters and rows split, what one device samples."""
  params = single_device()[0]
  run = jax.jit(functools.partial(sample, CONFIG, 'sharded'))
  expected = run(params, make_prompts())
  mesh = make_mesh(MESHES['all'])
  shardings = param_shardings(decoder.logical_axes(CONFIG), params, mesh)
  with jax.set_mesh(mesh):
    actual = run(jax.device_put(params, shardings), put_batch(make_prompts(), mesh))
  assert_same_samples(actual, expected)


def test_weights_gathered_once_are_not_gathered_at_every_token() -> None:
  """Of scanned layers, whose gathers the compiler cannot move out of the loop; same samples."""
  config = make_config('qwen2', vocab_multiple=2, scan_layers=True)
  mesh = make_mesh(MESHES['all'])
  shardings = param_shardings(decoder.logical_axes(config), params := make_params(config), mesh)
  samples, repeated = {}, {}
  with jax.set_mesh(mesh):
    arguments = jax.device_put(params, shardings), put_batch(make_prompts(), mesh)
    for weights in ('sharded', 'gathered'):
      run = functools.partial(sample, config, weights)
      compiled = jax.jit(run).lower(*arguments).compile()
      samples[weights] = compiled(*arguments)
      program = hlo.read(str(compiled.as_text()), dict(mesh.shape), unknown_trips=R)
      gathers = [each for each in program.collectives if each.kind == 'all-gather']
      repeated[weights] = [x for x in gathers if x.axes == 'fsdp' and x.times >= config.layers * R]
  assert repeated['sharded'] and not repeated['gathered']
  assert_same_samples(samples['gathered'], samples['sharded'])
