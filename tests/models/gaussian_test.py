"""The Gaussian policy against SciPy's densities, and its place among the objectives' policies."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from scipy import stats

from rlhf_jax.common.checks import ShapeError
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.data.segments import Segments
from rlhf_jax.models import gaussian
from rlhf_jax.models.gaussian import GaussianPolicyConfig
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh
from rlhf_jax.sharding.rules import param_shardings
from tests import numerical, quick

RNG = np.random.default_rng(0)
STATES: Any = RNG.normal(size=(4, 5, 3))
ACTIONS: Any = RNG.normal(size=(4, 5, 2))
LINEAR = GaussianPolicyConfig(state_size=3, action_size=2)
DEEP = dataclasses.replace(LINEAR, hidden=(6, 6), activation='tanh', bias=True, tanh_mean=True)
CONFIGS = {
  'linear': LINEAR,
  'deep': DEEP,
  'std': dataclasses.replace(LINEAR, std=0.3),
  'learned_std': dataclasses.replace(DEEP, learned_std=True, std=0.3),
}
every_config = pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)


def made(config: GaussianPolicyConfig) -> Any:
  """Parameters some way off their start."""
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32),
    gaussian.init(config, jax.random.key(0)),
  )


def stds(config: GaussianPolicyConfig, params: Any) -> np.ndarray:
  """`[A]` standard deviations."""
  return np.exp(np.float64(params['log_std'])) if config.learned_std else np.full(2, config.std)


@every_config
def test_log_probs_are_the_density_of_a_normal(config: GaussianPolicyConfig) -> None:
  """Summed over the numbers of an action, about the policy's mean."""
  params = made(config)
  mean = np.float64(gaussian.mean(config, params, jnp.asarray(STATES)))
  expected = stats.norm.logpdf(ACTIONS, mean, stds(config, params)).sum(-1)
  actual = quick.jit(functools.partial(gaussian.log_probs, config))(params, STATES, ACTIONS)
  assert actual.shape == (4, 5) and actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_unnormalised_defaults_are_the_squared_error_of_the_released_code() -> None:
  """-|mean - a|^2, which differs from the density by a constant."""
  plain = dataclasses.replace(DEEP, normalized=False)
  params = made(plain)
  square = np.square(gaussian.mean(plain, params, jnp.asarray(STATES)) - ACTIONS).sum(-1)
  actual = gaussian.log_probs(plain, params, jnp.asarray(STATES), jnp.asarray(ACTIONS))
  np.testing.assert_allclose(actual, -square, rtol=1e-5)
  density = gaussian.log_probs(DEEP, params, jnp.asarray(STATES), jnp.asarray(ACTIONS))
  np.testing.assert_allclose(density - actual, np.full((4, 5), -math.log(math.pi)), rtol=1e-4)


def test_the_mean_of_a_linear_policy_is_its_gain() -> None:
  """mean = gain s; with a bias, hidden layers or a tanh there is no such matrix."""
  params = made(LINEAR)
  gain = gaussian.gain(LINEAR, params)
  assert gain.shape == (2, 3)
  mean = gaussian.mean(LINEAR, params, jnp.asarray(STATES))
  np.testing.assert_allclose(mean, STATES @ np.float64(gain).T, rtol=1e-5, atol=1e-6)
  for change in ({'bias': True}, {'hidden': (4,)}, {'tanh_mean': True}):
    other = dataclasses.replace(LINEAR, **change)
    with pytest.raises(ValueError, match='A gain is all of a policy only'):
      gaussian.gain(other, gaussian.init(other, jax.random.key(0)))


def test_means_that_are_squashed_stay_in_bounds() -> None:
  """tanh of the same perceptron."""
  params, states = made(DEEP), jnp.asarray(9 * STATES)
  free = gaussian.mean(dataclasses.replace(DEEP, tanh_mean=False), params, states)
  np.testing.assert_allclose(gaussian.mean(DEEP, params, states), np.tanh(free), rtol=1e-5)


@pytest.mark.parametrize('name', ['linear', 'learned_std'])
def test_gradients_equal_central_differences(name: str) -> None:
  """By the last kernel and, where it is learned, by the standard deviation; random cotangents."""
  config = dataclasses.replace(CONFIGS[name], hidden=())
  params = made(config)
  weights = RNG.normal(size=(4, 5))

  def slow(part: str, point: np.ndarray) -> float:
    kernel = point if part == 'kernel' else np.float64(params['mean']['layer_0']['kernel'])
    mean = STATES @ kernel + np.float64(params['mean']['layer_0'].get('bias', 0))
    mean = np.tanh(mean) if config.tanh_mean else mean
    std = np.exp(point) if part == 'log_std' else stds(config, params)
    return float((stats.norm.logpdf(ACTIONS, mean, std).sum(-1) * weights).sum())

  slopes = quick.jit(
    jax.grad(lambda p: (gaussian.log_probs(config, p, STATES, ACTIONS) * weights).sum())
  )(params)
  found = {'kernel': slopes['mean']['layer_0']['kernel']}
  points = {'kernel': params['mean']['layer_0']['kernel']}
  if config.learned_std:
    found['log_std'], points['log_std'] = slopes['log_std'], params['log_std']
  for part, slope in found.items():
    expected = numerical.gradient(functools.partial(slow, part), points[part])
    np.testing.assert_allclose(slope, expected, rtol=2e-3, atol=2e-3)


@every_config
def test_entropy_is_that_of_a_normal(config: GaussianPolicyConfig) -> None:
  """Summed over the numbers of an action."""
  params = made(config)
  expected = stats.norm.entropy(scale=stds(config, params)).sum()
  assert gaussian.entropy(config, params) == pytest.approx(expected, rel=1e-5)


def test_objectives_see_log_probs_and_entropies_of_segments() -> None:
  """One number a step each, whatever the leading axes."""
  params = made(DEEP)
  segments = Segments(STATES, ACTIONS, np.ones((4, 5), bool))
  out = gaussian.policy_output(DEEP, params, segments)
  np.testing.assert_array_equal(
    out.logprobs, gaussian.log_probs(DEEP, params, jnp.asarray(STATES), jnp.asarray(ACTIONS))
  )
  assert out.entropy.shape == (4, 5) and out.values is None
  np.testing.assert_array_equal(out.entropy, gaussian.entropy(DEEP, params))


@every_config
def test_every_parameter_can_be_placed(config: GaussianPolicyConfig) -> None:
  """The axes are the parameters' tree, and all of it lies whole on every device."""
  shapes = jax.eval_shape(lambda: gaussian.init(config, jax.random.key(0)))
  mesh = make_mesh(MeshConfig())
  placed = param_shardings(gaussian.logical_axes(config), shapes, mesh)
  for sharding, leaf in zip(jax.tree.leaves(placed), jax.tree.leaves(shapes), strict=True):
    assert sharding.spec == PartitionSpec(*[None] * leaf.ndim)
    assert leaf.dtype == jnp.float32


def test_a_learned_deviation_starts_where_it_was_told() -> None:
  """And a fixed one is no parameter."""
  learned = gaussian.init(CONFIGS['learned_std'], jax.random.key(0))
  np.testing.assert_allclose(np.exp(learned['log_std']), [0.3, 0.3], rtol=1e-6)
  assert set(gaussian.init(LINEAR, jax.random.key(0))) == {'mean'}


def test_arrays_that_do_not_fit_are_refused() -> None:
  """The array is named."""
  params, states, actions = made(LINEAR), jnp.asarray(STATES), jnp.asarray(ACTIONS)
  with pytest.raises(ShapeError, match='states: expected 3 numbers'):
    gaussian.log_probs(LINEAR, params, states[..., :2], actions)
  with pytest.raises(ShapeError, match=r'actions: expected shape \(4, 5, 2\), got \(4, 5\)'):
    gaussian.log_probs(LINEAR, params, states, actions[..., 0])
  with pytest.raises(ShapeError, match='actions: expected shape'):
    gaussian.log_probs(LINEAR, params, states, actions[:1])


def test_sizes_come_from_the_data() -> None:
  """Filled in where they are 0, kept where they agree, refused where they do not or are missing."""
  open_sizes = GaussianPolicyConfig()
  open_sizes.validate('policy')
  assert open_sizes.with_sizes(3, 2, 'policy') == LINEAR == LINEAR.with_sizes(3, 2, 'policy')
  with pytest.raises(ConfigError, match=r'--config\.policy\.action_size=2: expected 1'):
    LINEAR.with_sizes(3, 1, 'policy')
  with pytest.raises(ConfigError, match='state_size=0'):
    gaussian.init(open_sizes, jax.random.key(0))


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('state_size', -1),
    ('action_size', -1),
    ('hidden', (8, 0)),
    ('activation', 'gelu'),
    ('std', 0.0),
    ('std', math.inf),
  ],
)
def test_values_that_cannot_work_are_refused(field: str, value: Any) -> None:
  """The message names the field."""
  with pytest.raises(ConfigError, match=rf'--config\.model\.{field}='):
    dataclasses.replace(LINEAR, **{field: value}).validate('model')


def test_a_learned_deviation_needs_the_whole_density() -> None:
  """Otherwise larger is always better."""
  with pytest.raises(ConfigError, match=r'--config\.model\.normalized=False'):
    dataclasses.replace(LINEAR, learned_std=True, normalized=False).validate('model')
