"""Chunks of the vocabulary change what is held, not what comes out."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import decoder
from rlhf_jax.models.readout import decoder_kl, decoder_scores
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh, put_batch
from rlhf_jax.sharding.rules import param_shardings
from tests.models.architectures import VOCAB, make_config

B, R = 8, 5
# 19 ids in 24 rows: the last chunk overlaps the one before it, and some rows are never scored.
CHUNKED: dict[str, Any] = dict(vocab_multiple=8, vocab_chunk=5, layers=1)
CASES: dict[str, dict[str, Any]] = {
  'untied': {},
  'tied': dict(tied_embeddings=True),
  'softcap': dict(tied_embeddings=True, logit_softcap=1.5),
  'one_part': dict(vocab_chunk=1000),
  'id_by_id': dict(vocab_chunk=1, logit_softcap=3.0),
}


def make_inputs(config: Any, scale: float = 3.0) -> tuple[Any, jax.Array, jax.Array]:
  """The outer parameters, hidden states `[B, R, D]` and tokens `[B, R]`; logits of size `scale`."""
  rng = np.random.default_rng(0)
  shapes = {
    name: leaf
    for name, leaf in jax.eval_shape(lambda: decoder.init(config, jax.random.key(0))).items()
    if name in ('embedding', 'unembedding')
  }
  std = scale / config.width**0.5
  params = {n: jnp.asarray(rng.normal(0, std, s.shape), jnp.float32) for n, s in shapes.items()}
  hidden = jnp.asarray(rng.normal(size=(B, R, config.width)), jnp.float32)
  return params, hidden, jnp.asarray(rng.integers(0, VOCAB, (B, R)), jnp.int32)


def mixture(config: Any, temperature: float, params: Any, hidden: Any, tokens: Any) -> Any:
  """A sum in which every output counts differently at every position, and the outputs."""
  scores = decoder_scores(config, params, hidden, tokens, temperature)
  weights = jnp.asarray(np.random.default_rng(1).normal(size=(3, B, R)), jnp.float32)
  parts = jnp.stack([scores.logprobs, scores.normalizer, scores.entropy])
  return (weights * parts).sum(), scores


def run(config: Any, temperature: float, inputs: Any) -> Any:
  """((sum, scores), gradients by parameters and hidden states)."""
  function = functools.partial(mixture, config, temperature)
  return jax.jit(jax.value_and_grad(function, (0, 1), has_aux=True))(*inputs)


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
  """Leaf by leaf."""
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, expected
  )


@pytest.mark.parametrize('case', CASES)
def test_scores_and_gradients_are_those_of_the_plain_way(case: str) -> None:
  """Log-probs, normalizers, entropies; gradients by hidden states and table, to 1e-5."""
  config = make_config(**(CHUNKED | CASES[case]))
  plain = make_config(**(CHUNKED | CASES[case] | dict(vocab_chunk=None)))
  inputs = make_inputs(config)
  (_, scores), gradients = run(config, 0.7, inputs)
  (_, expected), expected_gradients = run(plain, 0.7, inputs)
  assert_close(scores, expected)
  assert_close(gradients, expected_gradients)
  table = gradients[0]['embedding' if config.tied_embeddings else 'unembedding']
  rows = table if config.tied_embeddings else table.T
  assert not rows[VOCAB:].any() and rows[:VOCAB].any(-1).all()


def test_large_logits_stay_exact() -> None:
  """One id takes all: entropies near 0 and log-probs near -300 neither overflow nor cancel."""
  config = make_config(**CHUNKED)
  inputs = make_inputs(config, scale=100.0)
  (_, scores), gradients = run(config, 1.0, inputs)
  (_, expected), expected_gradients = run(
    make_config(**CHUNKED | {'vocab_chunk': None}), 1.0, inputs
  )
  assert float(expected.logprobs.min()) < -200
  assert_close(scores, expected)
  assert_close(gradients, expected_gradients, 1e-4)  # logits themselves are exact to 3e-5


def test_bfloat16_states_give_float32_scores() -> None:
  """Products of bfloat16 with float32 sums, as the plain way has them; master gradients float32."""
  config = make_config(**CHUNKED, dtype='bfloat16')
  params, hidden, tokens = make_inputs(config)
  inputs = (params, hidden.astype(jnp.bfloat16), tokens)
  (_, scores), gradients = run(config, 1.0, inputs)
  plain = make_config(**(CHUNKED | dict(vocab_chunk=None)), dtype='bfloat16')
  (_, expected), expected_gradients = run(plain, 1.0, inputs)
  assert {leaf.dtype for leaf in scores} == {jnp.dtype('float32')}
  assert gradients[0]['unembedding'].dtype == jnp.float32
  assert_close(scores, expected)
  wide, expected_wide = (
    jax.tree.map(lambda g: g.astype(np.float32), g) for g in (gradients, expected_gradients)
  )
  assert_close(wide, expected_wide, 0.05)


@pytest.mark.parametrize('case', ['untied', 'softcap'])
def test_exact_kl_is_that_of_the_plain_way(case: str) -> None:
  """Of two policies that differ in states and table; 0 of one with itself."""
  config = make_config(**(CHUNKED | CASES[case]))
  params, hidden, _ = make_inputs(config)
  other = jax.tree.map(lambda leaf: leaf[::-1] * 0.9, params), hidden[::-1]
  kl = jax.jit(lambda a, b: decoder_kl(config, a, b, 0.7))
  plain = make_config(**(CHUNKED | CASES[case] | dict(vocab_chunk=None)))
  expected = decoder_kl(plain, (params, hidden), other, 0.7)
  assert float(expected.min()) > 0
  assert_close(kl((params, hidden), other), expected)
  assert_close(kl((params, hidden), (params, hidden)), jnp.zeros((B, R)))


def test_no_array_holds_all_logits() -> None:
  """The compiled program has no [B, R, V] array in float32, and needs less memory."""
  sizes: Any = dict(vocab_size=4096, layers=1)
  programs: Any = {
    chunk: jax.jit(jax.grad(lambda *x, config=config: mixture(config, 1.0, *x)[0], (0, 1)))
    .lower(*make_inputs(config))
    .compile()
    for chunk in (None, 256)
    for config in [make_config(**sizes, vocab_chunk=chunk)]
  }
  whole = re.compile(rf'f32\[(1,)?({B},{R}|{B * R}),4096\]')
  assert whole.search(programs[None].as_text())
  assert not whole.search(programs[256].as_text())
  held = {chunk: p.memory_analysis().temp_size_in_bytes for chunk, p in programs.items()}
  assert held[256] < held[None] - 4 * B * R * 4096 / 2


@pytest.mark.slow
@pytest.mark.parametrize('case', ['untied', 'softcap'])
@pytest.mark.parametrize('sizes', [(1, 4, 2), (2, 2, 2)])
def test_a_table_cut_over_a_mesh_is_never_gathered(sizes: Any, case: str) -> None:
  """Results are those of one device; no collective moves as much as a whole table."""
  config = make_config(**(CHUNKED | CASES[case]))
  mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
  params, hidden, tokens = make_inputs(config)
  expected = run(config, 0.7, (params, hidden, tokens))
  axes = {name: axis for name, axis in decoder.logical_axes(config).items() if name in params}
  shardings = param_shardings(axes, params, mesh)
  inputs = (jax.device_put(params, shardings), *put_batch((hidden, tokens), mesh))
  function = functools.partial(mixture, config, 0.7)
  step = jax.jit(jax.value_and_grad(function, (0, 1), has_aux=True))
  with jax.set_mesh(mesh):
    actual = step(*inputs)
    text = str(step.lower(*inputs).compile().as_text())
  assert_close(actual, expected)
  rows = config.padded_vocab_size
  moved = re.findall(r'= \S*?\[([\d,]*)\]\S* (?:all-gather|all-to-all|all-reduce)', text)
  tables = [
    shape
    for shape in moved
    if math.prod(map(int, filter(None, shape.split(',')))) >= rows * config.width
  ]
  assert moved and not tables, moved
