"""Samples of one prompt are read behind one copy of it."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax.common.rows import map_rows
from rlhf_jax.common.types import Sequences
from rlhf_jax.models import roles
from rlhf_jax.objectives.best_of_n import BestOfNConfig
from rlhf_jax.objectives.grpo import GRPOConfig
from rlhf_jax.objectives.ppo import PPOConfig
from rlhf_jax.recipes.sharing import once_a_prompt, shared_rows, shared_samples
from tests.models.architectures import make_config, make_params
from tests.objectives.batches import VOCAB

MODEL = make_config('qwen3', vocab_size=VOCAB, layers=1)
PROMPTS, SAMPLES = 3, 4


def samples() -> Sequences:
  """Prompts of several lengths with `SAMPLES` responses of several lengths each, adjacent."""
  rng = np.random.default_rng(0)
  prompt = rng.integers(0, VOCAB, (PROMPTS, 5)).astype(np.int32)
  prompt_mask = np.arange(5) >= np.array([[0], [2], [4]])
  response = rng.integers(0, VOCAB, (PROMPTS * SAMPLES, 6)).astype(np.int32)
  response_mask = np.arange(6) < rng.integers(1, 7, (PROMPTS * SAMPLES, 1))
  repeated: Any = [np.repeat(x, SAMPLES, axis=0) for x in (prompt, prompt_mask)]
  return Sequences(repeated[0], repeated[1], response, response_mask)


def policy(params: Any, sequences: Sequences) -> Any:
  return roles.policy_output(MODEL, params, sequences, temperature=0.7)


def kl(params: Any, sequences: Sequences) -> Any:
  return roles.response_kl(MODEL, params, make_params(MODEL, seed=5), sequences, 0.7)


def reward_model(params: Any) -> Any:
  return roles.reward_model_from_trunk(MODEL, params, jax.random.key(1))


def reward(params: Any, sequences: Sequences) -> Any:
  return roles.reward_score(MODEL, reward_model(params), sequences)


def token_reward(params: Any, sequences: Sequences) -> Any:
  return roles.token_reward(MODEL, reward_model(params), sequences)


def assert_close(found: Any, expected: Any) -> None:
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


@pytest.mark.parametrize('parts', [1, 2])
@pytest.mark.parametrize('read', [policy, kl, reward, token_reward])
def test_models_say_the_same_of_each_sample(read: Any, parts: int) -> None:
  """Values and gradients, in one piece and in parts that hold as many samples of each prompt."""
  sequences, params = samples(), make_params(MODEL)
  mask = sequences.response_mask

  def total(params: Any, copies: int) -> Any:
    found = map_rows(lambda rows: once_a_prompt(read, copies)(params, rows), sequences, parts)
    # What is said of padding means nothing.
    found = jax.tree.map(lambda x: x * mask if x.ndim == 2 else x, found)
    return sum(x.sum() for x in jax.tree.leaves(found)), found

  both = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)
  (_, found), gradients = both(params, SAMPLES // parts)
  (_, expected), expected_gradients = both(params, 1)
  assert_close(found, expected)
  scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected_gradients))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(scale, 1.0)),
    gradients,
    expected_gradients,
  )


def test_a_prompt_is_read_once() -> None:
  """And a single sample, as when one is looked at, with its prompt."""
  seen = []

  def read(sequences: Sequences) -> Any:
    seen.append(sequences)
    return sequences.response

  sequences = samples()
  found = once_a_prompt(read, SAMPLES)(sequences)
  np.testing.assert_array_equal(found, sequences.response)
  one = jax.tree.map(lambda x: x[:1], sequences)
  np.testing.assert_array_equal(once_a_prompt(read, SAMPLES)(one), one.response)
  assert [rows.response.shape for rows in seen] == [(PROMPTS, SAMPLES, 6), (1, 6)]
  for name in ('prompt', 'prompt_mask'):
    read_once, alone = (getattr(rows, name) for rows in seen)
    np.testing.assert_array_equal(read_once, getattr(sequences, name)[::SAMPLES, None])
    np.testing.assert_array_equal(alone, getattr(one, name))


@pytest.mark.parametrize(
  ('objective', 'changes', 'devices', 'expected'),
  [
    (GRPOConfig(samples=8), {}, 1, (8, 8)),
    (GRPOConfig(samples=8, epochs=2), dict(accumulation=4), 4, (2, 2)),
    # Minibatches are drawn from all rows.
    (GRPOConfig(samples=8, minibatches=2), {}, 1, (8, 1)),
    # Not as many samples of each prompt in a microbatch; prompts that devices do not divide.
    (GRPOConfig(samples=6), dict(accumulation=4), 1, (1, 1)),
    (GRPOConfig(samples=8), {}, 16, (1, 1)),
    (BestOfNConfig(samples=4, keep=2), {}, 1, (4, 2)),
    (PPOConfig(), {}, 1, (1, 1)),
  ],
)
def test_as_many_share_a_prompt_as_a_microbatch_has(
  objective: Any, changes: Any, devices: int, expected: tuple[int, int]
) -> None:
  for share_prompts in (True, False):
    data = SimpleNamespace(share_prompts=share_prompts)
    stage: Any = SimpleNamespace(objective=objective, data=data, batch_size=8, accumulation=1)
    vars(stage).update(changes)
    found = shared_samples(stage, devices), shared_rows(stage, devices)
    assert found == (expected if share_prompts else (1, 1))
