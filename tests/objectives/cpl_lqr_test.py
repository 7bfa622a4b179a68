"""CPL where it is exact: a linear policy learns the optimal gain of the LQR task from regret."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.common.types import Pairs
from rlhf_jax.data.lqr import LQR, LQRConfig
from rlhf_jax.data.segments import make
from rlhf_jax.models import gaussian
from rlhf_jax.models.gaussian import GaussianPolicyConfig
from rlhf_jax.objectives import cpl
from rlhf_jax.objectives.base import Actors
from rlhf_jax.objectives.cpl import CPLConfig

POLICY = GaussianPolicyConfig(state_size=2, action_size=1)
TASK = LQR(LQRConfig())
ROWS, RATE = 256, 0.1


@functools.cache
def comparisons(labels: str = 'regret', temperature: float = 1.0) -> Pairs:
  """The task's 20,000 pairs of 16 steps."""
  return make(LQRConfig(labels=labels, temperature=temperature), held_out=0).train.comparisons


def train(
  pairs: Pairs, config: CPLConfig, policy: GaussianPolicyConfig = POLICY, epochs: int = 5
) -> Any:
  """Parameters after these epochs of Adam from a random gain, the rate falling along a cosine."""
  actors = Actors(policy=functools.partial(gaussian.policy_output, policy))
  rng, count = np.random.default_rng(0), len(pairs.preference)
  order = [rng.permutation(count)[: count - count % ROWS] for _ in range(epochs)]
  rows = np.concatenate(order).reshape(-1, ROWS)
  optimizer = optax.adam(optax.cosine_decay_schedule(RATE, len(rows)))

  def step(carry: Any, rows: jax.Array) -> Any:
    params, state = carry
    batch = jax.tree.map(lambda x: x[rows], data)

    def loss(params: Any) -> jax.Array:
      return cpl.loss(config, actors, params, batch)[0].value()

    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return (optax.apply_updates(params, updates), state), None

  data = jax.tree.map(jnp.asarray, pairs)
  params = gaussian.init(policy, jax.random.key(0))
  return jax.jit(jax.lax.scan, static_argnums=0)(step, (params, optimizer.init(params)), rows)[0][0]


def learned(pairs: Pairs, config: CPLConfig) -> np.ndarray:
  """`[1, 2]` float64: the gain that `train` ends with."""
  return np.asarray(gaussian.gain(POLICY, train(pairs, config)), np.float64)


def test_regret_labels_give_the_optimal_gain() -> None:
  """Alpha 1 and lambda 1: an error below 5% (0.4% when this was written), at the optimal cost."""
  gain = learned(comparisons(), CPLConfig(alpha=1.0, lam=1.0))
  assert TASK.gain_error(gain) < 0.02
  assert TASK.cost(gain) < 1.001 * TASK.optimal_cost


def test_the_conservative_bias_biases_the_gain() -> None:
  """Lambda 0.5 keeps to the data, and the gain does not become optimal (39% off)."""
  gain = learned(comparisons(), CPLConfig(alpha=1.0, lam=0.5))
  assert TASK.gain_error(gain) > 0.2
  assert TASK.cost(gain) > 1.03 * TASK.optimal_cost


def test_return_labels_do_not_give_the_optimal_gain() -> None:
  """Sums of rewards say how good the states were, which the score takes for regret (99% off)."""
  gain = learned(comparisons('return'), CPLConfig(alpha=1.0, lam=1.0))
  assert TASK.gain_error(gain) > 0.5
  assert TASK.cost(gain) > 2 * TASK.optimal_cost


def test_cloning_ends_at_the_behaviour() -> None:
  """Least squares on all actions, or on those preferred: far from the optimum either way."""
  segments: Any = comparisons().sequences
  for sides, error in ((slice(None), 0.9), (slice(1), 0.7)):
    states, actions = segments.states[:, sides], segments.actions[:, sides]
    gain = np.linalg.lstsq(states.reshape(-1, 2), actions.reshape(-1, 1))[0].T
    assert TASK.gain_error(gain) > error
    assert TASK.cost(gain) > 2 * TASK.optimal_cost


def test_noisier_labels_go_with_a_smaller_alpha() -> None:
  """Temperature 4 and alpha 1/4 is the same model, and learns the same gain."""
  pairs = comparisons(temperature=4.0)
  gain = learned(pairs, CPLConfig(alpha=0.25, lam=1.0))
  assert TASK.gain_error(gain) < 0.05


def test_a_learned_deviation_becomes_that_of_the_optimal_policy() -> None:
  """So the policy is the optimum of the maximum-entropy problem, noise and all."""
  policy = dataclasses.replace(POLICY, learned_std=True, std=1.0)
  params = train(comparisons(), CPLConfig(alpha=1.0, lam=1.0), policy, epochs=20)
  assert TASK.gain_error(np.asarray(gaussian.gain(policy, params))) < 0.02
  assert float(np.exp(params['log_std'][0])) == pytest.approx(math.sqrt(0.5), rel=0.05)


def test_the_optimal_policy_predicts_the_labels_as_well_as_can_be() -> None:
  """Its score differences are the logits the labels were drawn with, up to float32."""
  pairs = comparisons()
  actors = Actors(policy=functools.partial(gaussian.policy_output, POLICY))
  params = {'mean': {'layer_0': {'kernel': jnp.asarray(TASK.gain.T, jnp.float32)}}}
  segments: Any = pairs.sequences
  few = jax.tree.map(lambda x: jnp.asarray(x[:200]), pairs)
  actual = cpl.difference(CPLConfig(alpha=1.0), actors, params, few)
  states, actions = (x[:200].astype(np.float64) for x in (segments.states, segments.actions))
  totals = TASK.advantage(states, actions).sum(-1)
  np.testing.assert_allclose(actual, totals[:, 0] - totals[:, 1], rtol=1e-4, atol=1e-3)
