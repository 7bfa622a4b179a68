"""Completing texts with an opened policy."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common import prng
from rlhf_jax.feedback.dataset import Feedback, Split
from rlhf_jax.generation.config import GenerationConfig
from rlhf_jax.models import decoder
from rlhf_jax.recipes.completions import Completer, make_completer
from rlhf_jax.recipes.finished import Finished, open_run
from rlhf_jax.runs import Run
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh

PROMPTS = ['the soup was', 'we', 'the', 'not very good']


def opened(parents: Path, temperature: float, tensor: int = 1) -> Finished:
  """The tiny SFT policy, on the first devices."""
  run = Run(parents / 'sft')
  config = dataclasses.replace(run.config, generation=GenerationConfig(temperature=temperature))
  mesh = make_mesh(MeshConfig(data=1, tensor=tensor), jax.devices()[:tensor])
  return open_run(run, config, Feedback('', Split(), Split()), mesh, parents={})


@pytest.fixture(scope='module')
def completer(parents: Path) -> Completer:
  return make_completer(opened(parents, temperature=1.5))


def test_a_sample_does_not_depend_on_the_batch(completer: Completer) -> None:
  """Alone, among others and in another order: the same tokens of the same prompt and number."""
  key = prng.base_key(3)
  together = completer(PROMPTS, key, 2)
  found = {(row.prompt, row.sample): row for row in together}
  assert len({tuple(row.tokens) for row in together}) > 4
  for row in completer(PROMPTS[::-1], key, 2) + completer(PROMPTS[1:2], key, 1):
    other = found[row.prompt, row.sample]
    assert row.tokens == other.tokens
    np.testing.assert_allclose(row.logprobs, other.logprobs, atol=1e-5)


def test_samples_of_a_prompt_and_keys_differ(completer: Completer) -> None:
  """Another number or another key draws anew."""
  first = completer(['we'], prng.base_key(0), 4)
  second = completer(['we'], prng.base_key(1), 4)
  assert [row.sample for row in first] == [0, 1, 2, 3]
  assert len({tuple(row.tokens) for row in first + second}) > 4


def test_greedy_tokens_are_the_likeliest(parents: Path) -> None:
  """Each is the argmax of the whole decoder's next-token logits, computed without a cache."""
  policy: Any = opened(parents, temperature=0.0)
  model, params = policy.parts.model, policy.params['policy']
  eos = policy.parts.tokenizer.eos_id
  limit = policy.parts.config.data.response_length

  @jax.jit
  def likeliest(tokens: Any) -> Any:
    hidden, _ = decoder.hidden_states(model, params, tokens, jnp.ones_like(tokens, bool))
    return decoder.logits(model, params, hidden).argmax(-1)

  for row in make_completer(policy)(PROMPTS[:2], prng.base_key(0), 1):
    whole = [*row.prompt_tokens, *row.tokens]
    # What stands behind a token does not tell on it.
    padded = np.zeros((1, 24), np.int32)
    padded[0, : len(whole)] = whole
    following = likeliest(padded)[0, len(row.prompt_tokens) - 1 : len(whole) - 1]
    np.testing.assert_array_equal(row.tokens, following)
    assert row.finished == (row.tokens[-1] == eos)
    assert row.finished or len(row.tokens) == limit


def test_prompts_of_any_length_are_read_whole(parents: Path) -> None:
  """Where batches are as wide as their prompts: up to the length that there is room for."""
  narrow = opened(parents, temperature=0.0)
  parts = dataclasses.replace(
    narrow.parts,
    config=dataclasses.replace(
      narrow.parts.config, data=dataclasses.replace(narrow.parts.config.data, prompt_length=6)
    ),
  )
  wide, key = make_completer(narrow._replace(parts=parts), fit=True), prng.base_key(0)
  (short,) = wide(['the soup was'], key, 1)
  (long,) = wide(['we the soup was the soup was'], key, 1)
  assert [len(row.prompt_tokens) for row in (short, long)] == [4, 6]
  assert [row.prompt_tokens_cut for row in (short, long)] == [0, 2]
  (odd,) = wide(['the xylophone was xyz'], key, 1)
  assert [row.prompt_tokens_unknown for row in (short, odd)] == [0, 2]
  assert short.tokens == make_completer(narrow)(['the soup was'], key, 1)[0].tokens


def test_two_devices_complete_like_one(parents: Path) -> None:
  """Matrices shared over a tensor axis give the same greedy tokens."""
  key = prng.base_key(0)
  one, two = (
    make_completer(opened(parents, temperature=0.0, tensor=count))(PROMPTS, key, 1)
    for count in (1, 2)
  )
  assert [row.tokens for row in one] == [row.tokens for row in two]
