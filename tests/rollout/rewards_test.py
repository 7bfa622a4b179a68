"""Several rewards or several judges become one score, as a loop over single rows says."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.checks import ShapeError
from rlhf_jax.rollout.config import RewardConfig
from rlhf_jax.rollout.rewards import AGGREGATES, aggregate, combine, counted

RNG = np.random.default_rng(0)
B = 64


def slow_combine(rows: np.ndarray, configs: list[RewardConfig]) -> np.ndarray:
  """`[K, B]` rewards -> `[B]` scores, one row after the other."""
  scores = []
  for rewards in rows.T.tolist():
    gates = [
      config.weight * reward
      for reward, config in zip(rewards, configs, strict=True)
      if config.gate_below is not None and reward < config.gate_below
    ]
    total = 0.0
    for reward, config in zip(rewards, configs, strict=True):
      limit = np.inf if config.clip_above is None else config.clip_above
      total += config.weight * min(reward, limit)
    scores.append(gates[0] if gates else total)
  return np.array(scores)


COMBINATIONS: dict[str, list[RewardConfig]] = {
  'one': [RewardConfig()],
  'weights': [RewardConfig(weight=0.5), RewardConfig(source='task', weight=-2.0)],
  'thresholds': [RewardConfig(clip_above=0.3), RewardConfig(weight=2.0, clip_above=-0.2)],
  'gate': [RewardConfig(weight=1.5), RewardConfig(weight=3.0, gate_below=-0.5)],
  'two gates, a threshold': [
    RewardConfig(gate_below=0.0),
    RewardConfig(weight=2.0, gate_below=0.5, clip_above=0.7),
    RewardConfig(weight=0.1),
  ],
}


@pytest.mark.parametrize('name', COMBINATIONS)
def test_rewards_are_summed_cut_and_gated(name: str) -> None:
  """Weights, thresholds and gates together; of several closed gates the first one counts."""
  configs = COMBINATIONS[name]
  rewards = RNG.normal(size=(len(configs), B))
  found = combine([jnp.asarray(row, jnp.float32) for row in rewards], configs)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, slow_combine(rewards, configs), rtol=1e-5, atol=1e-6)


def test_safety_comes_before_helpfulness() -> None:
  """By hand: an unsafe response is paid for safety alone, however helpful; a safe one for both."""
  configs = [RewardConfig(weight=1.0, clip_above=2.0), RewardConfig(weight=0.5, gate_below=0.0)]
  helpful, safe = jnp.array([9.0, 9.0, 1.0]), jnp.array([-4.0, 1.0, 0.0])
  np.testing.assert_allclose(combine([helpful, safe], configs), [-2.0, 2.5, 1.0])


@pytest.mark.parametrize('kind', AGGREGATES)
@pytest.mark.parametrize('shape', [(2, 5), (3, 5), (3, 4, 6)])
def test_an_ensembles_score(kind: str, shape: tuple[int, ...]) -> None:
  """Mean, minimum, or mean less coefficient x biased variance over members; tokens likewise."""
  scores = RNG.normal(size=shape)
  expected = {
    'mean': np.mean(scores, axis=0),
    'worst': np.min(scores, axis=0),
    'uncertainty': np.mean(scores, axis=0) - 0.7 * np.var(scores, axis=0),
  }
  found = aggregate(jnp.asarray(scores, jnp.float32), kind, 0.7)
  np.testing.assert_allclose(found, expected[kind], rtol=1e-5, atol=1e-6)


def test_members_that_agree_are_their_score() -> None:
  """No disagreement costs nothing; an ensemble of one is that member."""
  row = jnp.asarray(RNG.normal(size=5), jnp.float32)
  for kind in AGGREGATES:
    for count in (1, 2, 4):
      found = aggregate(jnp.stack([row] * count), kind, 100.0)
      np.testing.assert_allclose(found, row, rtol=1e-5)


def test_disagreement_costs() -> None:
  """Of two responses with equal mean scores the one that members agree on is worth more."""
  scores: Any = jnp.array([[1.0, 3.0], [1.0, -1.0]])
  for kind in ('worst', 'uncertainty'):
    agreed, disputed = aggregate(scores, kind, 0.1)
    assert agreed > disputed


def test_integers_and_unknown_kinds_are_refused() -> None:
  with pytest.raises(ShapeError, match='reward_1: expected a floating-point array'):
    combine([jnp.ones(3), jnp.ones(3, int)], [RewardConfig(), RewardConfig()])
  with pytest.raises(ShapeError, match='scores: expected a floating-point array'):
    aggregate(jnp.ones((2, 3), int), 'mean', 1.0)
  with pytest.raises(ValueError, match='median'):
    aggregate(jnp.ones((2, 3)), 'median', 1.0)


def test_llama_2s_reward_is_either_safety_or_helpfulness() -> None:
  """Touvron et al. 2023, section 3.2.3: R_s where R_s < 0.15, else R_h, without any sum."""
  safety, helpfulness = jnp.array([0.1, 0.14, 0.2, 0.9]), jnp.array([5.0, -5.0, 2.0, -1.0])
  terms = (RewardConfig(gate_below=0.15, gate_only=True), RewardConfig(source='task'))
  np.testing.assert_allclose(combine([safety, helpfulness], terms), [0.1, 0.14, 2.0, -1.0])
  np.testing.assert_array_equal(
    counted([safety, helpfulness], terms), [[True, True, False, False], [False, False, True, True]]
  )
