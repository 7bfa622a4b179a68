"""Tokens are drawn from the distribution that is asked for, and from nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.generation.config import GenerationConfig
from rlhf_jax.generation.drawing import draw, filter_logits, sample_tokens
from rlhf_jax.planning import hlo
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh


def test_tokens_are_drawn_from_the_distribution() -> None:
  """20,000 draws at temperature 0.5 have the frequencies of softmax(2 logits), to 5 deviations."""
  logits = jnp.asarray([0.3, -1.0, 0.0, 1.1, -0.4])
  keys = jax.random.split(jax.random.key(0), 20_000)
  tokens, logprobs = sample_tokens(
    jnp.broadcast_to(logits, (20_000, 5)), keys, GenerationConfig(temperature=0.5)
  )
  probs = np.asarray(jax.nn.softmax(2 * logits))
  deviations = (np.bincount(tokens) - 20_000 * probs) / np.sqrt(20_000 * probs * (1 - probs))
  assert np.abs(deviations).max() < 5
  np.testing.assert_allclose(logprobs, np.log(probs)[np.asarray(tokens)], atol=1e-5)


@pytest.mark.parametrize('top_p', [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize('top_k', [0, 1, 3, 50])
def test_filters_keep_the_likeliest(top_k: int, top_p: float) -> None:
  """Sorted by hand: k tokens, then the fewest whose renormalised mass reaches p."""
  logits = np.random.default_rng(0).normal(0, 2, (20, 9)).astype(np.float32)
  actual = filter_logits(jnp.asarray(logits), GenerationConfig(top_k=top_k, top_p=top_p))
  for row, kept in zip(logits, np.asarray(actual), strict=True):
    order = np.argsort(-row)[: top_k if top_k else None]
    probs = np.exp(row[order]) / np.exp(row[order]).sum()
    count = 1
    while probs[:count].sum() < top_p and count < len(order):
      count += 1
    expected = np.full(9, -np.inf, np.float32)
    expected[order[:count]] = row[order[:count]]
    np.testing.assert_array_equal(kept, expected)


def test_ties_with_the_last_token_kept_are_kept() -> None:
  """Nothing arbitrary decides between equal logits."""
  logits = jnp.asarray([[1.0, 2.0, 1.0, 0.0]])
  kept = jnp.isfinite(filter_logits(logits, GenerationConfig(top_k=2)))
  assert kept.tolist() == [[True, True, True, False]]


@pytest.mark.parametrize('size', [1, 7, 128, 1000])
def test_a_draw_inverts_the_cumulative_distribution(size: int) -> None:
  """As counted in float64: the token at which the running total first exceeds the random number."""
  chance = np.random.default_rng(size)
  logits = chance.normal(0, 3, (500, size)).astype(np.float32)
  uniform = chance.random(500, np.float32)
  drawn = np.asarray(jax.jit(draw)(jnp.asarray(logits), jnp.asarray(uniform)))
  wide = np.exp(logits.astype(np.float64))
  totals = np.cumsum(wide, -1) / wide.sum(-1, keepdims=True)
  rows = np.arange(500)
  below = np.where(drawn > 0, totals[rows, drawn - 1], 0.0)
  assert (below <= uniform + 1e-6).all() and (uniform <= totals[rows, drawn] + 1e-6).all()


@pytest.mark.parametrize('uniform', [0.0, 0.5, 1 - 2.0**-24])
@pytest.mark.parametrize('allowed', [[0], [299], [3, 130], [127, 128, 255, 256]])
def test_what_is_forbidden_is_never_drawn(allowed: list[int], uniform: float) -> None:
  """At either end of the random numbers, on either side of the blocks, and for huge logits."""
  logits = np.full((1, 300), -np.inf, np.float32)
  logits[0, allowed] = np.linspace(1e4, 1e4 - 1, len(allowed))
  drawn = int(draw(jnp.asarray(logits), jnp.asarray([uniform], jnp.float32))[0])
  assert drawn == (allowed[0] if uniform == 0 else drawn) and drawn in allowed
  if uniform > 0.9:
    assert drawn == allowed[-1]


def test_many_small_probabilities_add_up() -> None:
  """A uniform distribution over 32,000 tokens: halves of the numbers give halves of the tokens."""
  uniform = (jnp.arange(2000) + 0.5) / 2000
  drawn = np.asarray(jax.jit(draw)(jnp.zeros((2000, 32_000)), uniform))
  np.testing.assert_allclose(drawn, np.asarray(uniform) * 32_000, atol=1.5)


@pytest.mark.parametrize('size', [16_000, 16_001])
def test_a_mesh_draws_from_its_shards(size: int) -> None:
  """The tokens of one device; of logits that lie on several, no device is sent another's."""
  chance = np.random.default_rng(size)
  logits = jnp.asarray(chance.normal(0, 3, (64, size)), jnp.float32)
  uniform = jnp.asarray(chance.random(64), jnp.float32)
  expected = jax.jit(draw)(logits, uniform)
  mesh = make_mesh(MeshConfig(data=1, tensor=8), jax.devices()[:8])
  with jax.set_mesh(mesh):
    cut = NamedSharding(mesh, PartitionSpec(None, 'tensor' if size % 8 == 0 else None))
    logits = jax.device_put(logits, cut)
    compiled = jax.jit(draw).lower(logits, uniform).compile()
    np.testing.assert_array_equal(compiled(logits, uniform), expected)
  sent = hlo.read(compiled.as_text() or '', dict(mesh.shape), 1).collectives
  assert max((each.bytes for each in sent), default=0) < logits.nbytes / 16
