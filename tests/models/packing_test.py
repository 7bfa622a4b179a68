"""Packed texts are read as if each had a row to itself."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.types import Sequences
from rlhf_jax.data.packing import Packer
from rlhf_jax.models import decoder, roles
from rlhf_jax.models.packing import lay_out
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh, put_batch
from rlhf_jax.sharding.rules import param_shardings
from tests.models.architectures import VOCAB, make_config, make_params

WHOLE = Packer()
P, R = 4, 7
# Real tokens of each text's prompt and response.
LENGTHS = ((4, 7), (1, 1), (2, 3), (4, 2), (1, 4), (3, 1), (1, 2), (2, 5))


def make_texts() -> Sequences:
  """Eight texts of different lengths; what lies under the padding is arbitrary."""
  rng = np.random.default_rng(0)
  prompts, responses = (np.array(x)[:, None] for x in zip(*LENGTHS, strict=True))
  return Sequences(
    prompt=rng.integers(0, VOCAB, (len(LENGTHS), P)).astype(np.int32),
    prompt_mask=np.arange(P) >= P - prompts,
    response=rng.integers(0, VOCAB, (len(LENGTHS), R)).astype(np.int32),
    response_mask=np.arange(R) < responses,
  )


def packed(texts: Sequences, packer: Packer = WHOLE) -> Sequences:
  lengths = np.asarray(texts.prompt_mask).sum(1) + np.asarray(texts.response_mask).sum(1)
  return dataclasses.replace(texts, packing=packer.pack(lengths, P + R))


def test_a_block_is_laid_out_as_its_packing_says() -> None:
  """Every token once, at its place, with the number of its text; nothing elsewhere."""
  texts = make_texts()
  packing = packed(texts).packing
  assert packing is not None and packing.rows < packing.records
  tokens = np.concatenate([texts.prompt, texts.response], axis=1)
  mask = np.concatenate([texts.prompt_mask, texts.response_mask], axis=1)
  lay = jax.jit(functools.partial(lay_out, rows=packing.rows, width=packing.width))
  found, owner = lay(tokens, mask, packing.row, packing.start)
  expected = np.zeros((2, packing.rows, packing.width), int)
  for text, (row, start) in enumerate(zip(packing.row, packing.start, strict=True)):
    real = tokens[text][mask[text]]
    expected[:, row, start : start + len(real)] = real, np.full(len(real), text + 1)
  np.testing.assert_array_equal([found, owner], expected)


@pytest.mark.parametrize(
  ('name', 'changes'),
  [
    ('gpt2', dict(layers=1)),
    ('gemma3', dict(scan_layers=True, remat='full')),
    pytest.param('qwen3', dict(vocab_chunk=7), marks=pytest.mark.slow),
  ],
)
def test_packed_texts_have_the_log_probs_that_they_have_alone(name: str, changes: Any) -> None:
  """Values and gradients, windows and positions counted from each text's beginning."""
  config = make_config(name, **changes)
  texts = make_texts()

  def total(params: Any, rows: Sequences) -> Any:
    output = roles.policy_output(config, params, rows, temperature=1.0)
    masked = jnp.where(rows.response_mask, output.logprobs, 0)
    return (jnp.arange(1.0, 9.0)[:, None] * masked).sum(), masked

  one = jax.jit(jax.value_and_grad(total, has_aux=True))
  (_, found), gradients = one(make_params(config), packed(texts))
  (_, expected), expected_gradients = one(make_params(config), texts)
  np.testing.assert_allclose(found, expected, atol=2e-5)
  jax.tree.map(_assert_close, gradients, expected_gradients)


def _assert_close(a: jax.Array, b: jax.Array) -> None:
  np.testing.assert_allclose(a, b, atol=5e-6 + 1e-5 * float(jnp.abs(b).max()))


def test_a_part_of_a_block_is_read_row_by_row() -> None:
  """As when the loss of a single row is asked for."""
  config = make_config()
  texts, params = make_texts(), make_params(config)

  def logprobs(rows: Sequences) -> jax.Array:
    return roles.policy_output(config, params, rows, temperature=1.0).logprobs

  one = jax.tree.map(lambda x: x[2:3], packed(texts))
  mask = one.response_mask
  plain = logprobs(jax.tree.map(lambda x: x[2:3], texts))
  np.testing.assert_array_equal(logprobs(one)[mask], plain[mask])


@pytest.mark.slow
def test_blocks_of_a_mesh_are_packed_by_themselves() -> None:
  """Loss and gradients on eight devices are those of plain rows on one."""
  config = make_config('qwen2', vocab_multiple=2)
  params, texts = make_params(config), make_texts()

  def loss(params: Any, rows: Sequences) -> jax.Array:
    logprobs = roles.policy_output(config, params, rows, temperature=1.0).logprobs
    return jnp.where(rows.response_mask, logprobs, 0).sum()

  expected_loss, expected = jax.jit(jax.value_and_grad(loss))(params, texts)
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  shardings = param_shardings(decoder.logical_axes(config), params, mesh)
  rows = packed(texts, Packer(devices=4))
  assert rows.packing is not None and rows.packing.records == 2
  with jax.set_mesh(mesh):
    value, gradients = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))(
      jax.device_put(params, shardings), put_batch(rows, mesh)
    )
  np.testing.assert_allclose(value, expected_loss, rtol=1e-6)
  jax.tree.map(_assert_close, jax.device_get(gradients), expected)
