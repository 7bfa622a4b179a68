"""The state holds all that the next step depends on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.common import prng, trees
from rlhf_jax.training.state import TrainState


def make(seed: int = 3) -> TrainState:
  params = {'policy': {'kernel': jnp.ones((2, 3))}}
  return TrainState.create(params, optax.adam(1e-3), seed, {'kl_coefficient': jnp.float32(0.2)})


def test_a_new_state_begins_at_step_zero_with_an_untouched_optimizer() -> None:
  state = make()
  assert state.step.dtype == jnp.int32 and int(state.step) == 0
  assert int(state.opt_state[0].count) == 0
  moments = trees.flatten(state.opt_state[0].mu)
  assert not any(np.asarray(moment).any() for moment in moments.values())
  assert moments.keys() == trees.flatten(state.params).keys()


def test_targets_have_roles_of_their_own_and_no_optimizer_state() -> None:
  """By role the state has both; Adam's moments are those of params alone."""
  params, target = {'policy': {'kernel': jnp.ones((2, 3))}}, {'kernel': jnp.zeros((2, 3))}
  state = TrainState.create(params, optax.adam(1e-3), 3, {}, {'policy_target': target})
  assert state.by_role == {**params, 'policy_target': target}
  assert trees.flatten(state.opt_state[0].mu).keys() == {'policy.kernel'}
  with pytest.raises(ValueError, match='both params and targets: policy'):
    TrainState.create(params, optax.adam(1e-3), 3, {}, {'policy': target})


def test_all_randomness_follows_from_seed_stream_and_step() -> None:
  """A stream's key is that of the run's seed and the step, whatever came between."""
  state = dataclasses.replace(make(), step=jnp.int32(7))
  expected = prng.stream_key(prng.base_key(3), prng.Stream.SAMPLING, 7)
  data = jax.random.key_data
  np.testing.assert_array_equal(data(state.stream(prng.Stream.SAMPLING)), data(expected))
  others = [
    make().stream(prng.Stream.SAMPLING),
    state.stream(prng.Stream.MINIBATCHES),
    dataclasses.replace(make(4), step=jnp.int32(7)).stream(prng.Stream.SAMPLING),
  ]
  for other in others:
    assert not np.array_equal(data(other), data(expected))


def test_a_state_is_a_pytree_of_arrays() -> None:
  """jit takes and gives it; every leaf can be written to a checkpoint."""
  state = jax.jit(lambda state: state)(make())
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
  assert not any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(state))
