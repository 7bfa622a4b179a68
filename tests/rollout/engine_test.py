"""The engine of this process: short batches take short programs, and get the same responses."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax.common import prng
from rlhf_jax.common.types import Prompts, Sequences
from rlhf_jax.generation.config import GenerationConfig
from rlhf_jax.generation.sample import generate
from rlhf_jax.generation.samples import Samples, repeat_prompts, samples_to_sequences
from rlhf_jax.models import decoder
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.rollout.engine import Generated, LocalEngine, bucket_lengths
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh, share_of

ROWS, P, COPIES = 4, 8, 2
MODEL = ModelConfig(vocab_size=11, width=16, layers=1, heads=2, mlp_width=32)


@pytest.mark.parametrize(
  ('longest', 'count', 'expected'),
  [
    (8, 1, [8]),
    (8, 3, [2, 4, 8]),
    (100, 4, [13, 25, 50, 100]),
    (5, 2, [3, 5]),
    (2, 5, [1, 2]),
  ],
)
def test_lengths_are_halved(longest: int, count: int, expected: list[int]) -> None:
  assert bucket_lengths(longest, count) == expected


def make_prompts(*lengths: int) -> Prompts:
  """Prompts of so many tokens, left-padded to P."""
  tokens = np.random.default_rng(sum(lengths)).integers(1, 11, (ROWS, P)).astype(np.int32)
  mask = np.arange(P) >= P - np.array(lengths)[:, None]
  return Prompts(np.where(mask, tokens, 0), mask, np.arange(ROWS, dtype=np.int32))


def make_engine(lengths: list[int], seen: list[int]) -> LocalEngine:
  """An engine that notes the columns of prompts that it compiles a program for."""

  def sampler(params: Any, prompts: Prompts, key: Any) -> tuple[Sequences, Samples]:
    seen.append(prompts.tokens.shape[1])
    samples = generate(
      MODEL,
      params['policy'],
      prompts,
      key,
      config=GenerationConfig(),
      max_new_tokens=5,
      eos_id=2,
      pad_id=0,
      samples=COPIES,
    )
    return samples_to_sequences(repeat_prompts(prompts, COPIES), samples), samples

  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  return LocalEngine(sampler, mesh, share_of(ROWS, mesh), lengths)


@functools.cache
def params() -> Any:
  return {'policy': decoder.init(MODEL, jax.random.key(0))}


def sample(engine: LocalEngine, prompts: Prompts, step: int) -> Generated:
  engine.sync_weights(params(), step)
  return jax.device_get(engine.generate(prompts, prng.base_key(step)))


def test_samples_do_not_depend_on_buckets() -> None:
  """Tokens, masks and the whole width of the prompts are the same; log-probs to float error."""
  batches = [make_prompts(1, 2, 1, 2), make_prompts(8, 1, 5, 2), make_prompts(1, 3, 2, 4)]
  seen: dict[int, list[int]] = {1: [], 2: []}
  engines = {count: make_engine(bucket_lengths(P, count), seen[count]) for count in seen}
  for step in range(6):
    prompts = batches[step % 3]
    whole, cut = (sample(engine, prompts, step) for engine in engines.values())
    assert whole.sequences.prompt.shape == (ROWS * COPIES, P)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
      assert one.shape == other.shape and one.dtype == other.dtype
    jax.tree.map(np.testing.assert_array_equal, whole.sequences, cut.sequences)
    np.testing.assert_array_equal(whole.finished, cut.finished)
    assert whole.logprobs is not None and cut.logprobs is not None
    np.testing.assert_allclose(whole.logprobs, cut.logprobs, atol=1e-5)
    np.testing.assert_array_equal(whole.sequences.prompt[::COPIES], prompts.tokens)
  assert seen == {1: [P], 2: [4, P]}, 'each length is compiled once, when it is needed'


def test_new_weights_are_taken_at_once() -> None:
  """Nothing of the old ones is kept, and `close` may be called twice."""
  engine = make_engine([P], [])
  prompts = make_prompts(3, 4, 8, 2)
  first = sample(engine, prompts, 0)
  engine.sync_weights({'policy': decoder.init(MODEL, jax.random.key(1))}, 0)
  second = jax.device_get(engine.generate(prompts, prng.base_key(0)))
  assert (first.sequences.response != second.sequences.response).any()
  engine.close()
  engine.close()
