"""Schedules by hand, and update rules against the formulas of the libraries they stand for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer

RNG = np.random.default_rng(0)
STEPS = 5
# Gradients of very different sizes, so that the place of epsilon shows.
GRADIENTS: Any = RNG.normal(0, 1, (STEPS, 4)) * np.array([1.0, 1e-3, 1e-6, 1e-9])
START: Any = RNG.normal(0, 1, 4)


def rates(total: int, **settings: Any) -> list[float]:
  """Learning rates of the first `total` updates, and of one more."""
  schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, **settings), total)
  return [float(schedule(count)) for count in range(total + 1)]


def test_linear_decay_reaches_zero_after_the_last_update() -> None:
  """1 - updates made / all updates, as OpenAI's and N+'s `frac`: the first at the full rate."""
  np.testing.assert_allclose(rates(4, schedule='linear'), [1.0, 0.75, 0.5, 0.25, 0.0], atol=1e-7)


def test_cosine_decay() -> None:
  """Half a cosine from the peak to the final fraction."""
  expected = [0.1 + 0.9 * (1 + np.cos(np.pi * t / 4)) / 2 for t in range(5)]
  np.testing.assert_allclose(rates(4, schedule='cosine', final_fraction=0.1), expected, rtol=1e-5)


@pytest.mark.parametrize('schedule', ['constant', 'linear', 'cosine'])
@pytest.mark.parametrize('warmup', [1, 3])
def test_warmup_rises_linearly_to_the_peak(schedule: str, warmup: int) -> None:
  """Update k of the warm-up has rate k / warmup, from the first update on; decay follows it."""
  after = 4
  actual = rates(warmup + after, schedule=schedule, warmup_updates=warmup)
  np.testing.assert_allclose(actual[:warmup], [(k + 1) / warmup for k in range(warmup)], rtol=1e-6)
  np.testing.assert_allclose(actual[warmup:], rates(after, schedule=schedule), rtol=1e-5, atol=1e-7)


def test_a_run_shorter_than_its_warmup_only_rises() -> None:
  """No division by the negative number of updates left for the decay."""
  np.testing.assert_allclose(rates(2, schedule='linear', warmup_updates=4), [0.25, 0.5, 0.75])


def run(config: OptimizerConfig, total: int = STEPS) -> np.ndarray:
  """Parameters after each of the updates with GRADIENTS, `[STEPS, 4]`."""
  optimizer = make_optimizer(config, total)

  @jax.jit
  def trajectory(params: jax.Array, gradients: jax.Array) -> jax.Array:
    def step(carry: Any, gradient: jax.Array) -> tuple[Any, jax.Array]:
      params, state = carry
      updates, state = optimizer.update(gradient, state, params)
      params = optax.apply_updates(params, updates)
      return (params, state), params

    return jax.lax.scan(step, (params, optimizer.init(params)), gradients)[1]

  return np.asarray(
    trajectory(jnp.asarray(START, jnp.float32), jnp.asarray(GRADIENTS, jnp.float32))
  )


def moved(trajectory: np.ndarray) -> np.ndarray:
  """How far each update went."""
  return np.diff(np.concatenate([START[None], trajectory]), axis=0)


LARGE_RATE: dict[str, Any] = {'learning_rate': 0.1, 'clip_norm': 0.0}


def test_rmsprop_is_pytorchs() -> None:
  """v = a v + (1 - a) g^2; p -= lr g / (sqrt(v) + eps): epsilon outside the root, no correction.

  `torch.optim.RMSprop`, uncentred and without momentum, which the authors of DPO used.
  """
  config = OptimizerConfig(name='rmsprop', b2=0.99, epsilon=1e-4, **LARGE_RATE)
  v, params, expected = np.zeros(4), START.copy(), []
  for gradient in GRADIENTS:
    v = 0.99 * v + 0.01 * gradient**2
    params = params - 0.1 * gradient / (np.sqrt(v) + 1e-4)
    expected.append(params)
  np.testing.assert_allclose(run(config), expected, rtol=1e-4, atol=1e-6)


def test_the_recipe_of_the_dpo_authors() -> None:
  """Every update of their trainer, past its warm-up, with gradients above and below the clip norm.

  torch.optim.RMSprop(lr=5e-7) with its defaults, alpha 0.99 and eps 1e-8; clip_grad_norm_ at 10;
  LambdaLR min(1, (step + 1) / (150 + 1)), so that 150 "warm-up steps" are 151 updates here.
  """
  config = OptimizerConfig(
    name='rmsprop', learning_rate=5e-7, b2=0.99, epsilon=1e-8, warmup_updates=151, clip_norm=10.0
  )
  steps = 160
  rng = np.random.default_rng(1)
  gradients = rng.normal(size=(steps, 3)) * 10.0 ** rng.uniform(-8, 2, (steps, 3))
  norms = np.linalg.norm(gradients, axis=1)
  assert (norms > 10).any() and (norms < 10).any()
  square_average, expected = np.zeros(3), []
  for step, gradient in enumerate(gradients):
    gradient = gradient * min(1.0, 10.0 / (norms[step] + 1e-6))
    square_average = 0.99 * square_average + (1 - 0.99) * gradient**2
    rate = 5e-7 * min(1.0, (step + 1) / (150 + 1))
    expected.append(-rate * gradient / (np.sqrt(square_average) + 1e-8))
  optimizer = make_optimizer(config, steps)

  def move(state: Any, gradient: jax.Array) -> tuple[Any, jax.Array]:
    update, state = optimizer.update(gradient, state)
    return state, update

  start = optimizer.init(jnp.zeros(3))
  updates = jax.jit(lambda g: jax.lax.scan(move, start, g)[1])(jnp.asarray(gradients, jnp.float32))
  np.testing.assert_allclose(updates, expected, rtol=1e-4)


def slow_adam(placement: str, epsilon: float, decay: float = 0.0) -> np.ndarray:
  """Adam(W) of PyTorch ('inside') or of TensorFlow 1 ('outside') in float64."""
  m, v, params, out = np.zeros(4), np.zeros(4), START.copy(), []
  for t, gradient in enumerate(GRADIENTS, start=1):
    m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
    if placement == 'inside':
      update = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + epsilon)
    else:
      step_size = np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
      update = step_size * m / (np.sqrt(v) + epsilon)
    params = params - 0.1 * (update + decay * params)
    out.append(params)
  return np.array(out)


@pytest.mark.parametrize('placement', ['inside', 'outside'])
def test_adam_is_pytorchs_or_tensorflows(placement: str) -> None:
  """With an epsilon that matters at half of the gradients."""
  config = OptimizerConfig(epsilon=1e-5, epsilon_placement=placement, **LARGE_RATE)
  np.testing.assert_allclose(run(config), slow_adam(placement, 1e-5), rtol=1e-4, atol=1e-6)


def test_tensorflows_epsilon_is_the_larger_in_early_updates() -> None:
  """It acts as epsilon / sqrt(1 - b2^t): 32 times PyTorch's in the first update."""
  outside = moved(run(OptimizerConfig(epsilon=1e-5, epsilon_placement='outside', **LARGE_RATE)))
  larger = moved(slow_adam('inside', 1e-5 / np.sqrt(1 - 0.999)))
  np.testing.assert_allclose(outside[0], larger[0], rtol=1e-3, atol=1e-6)
  plain = moved(run(OptimizerConfig(epsilon=1e-5, **LARGE_RATE)))
  assert abs(outside[0, 2]) < 0.1 * abs(plain[0, 2])


def test_weight_decay_is_decoupled() -> None:
  """lr x decay x parameter, outside of Adam's scaling (Loshchilov & Hutter 2019)."""
  config = OptimizerConfig(weight_decay=0.3, **LARGE_RATE)
  np.testing.assert_allclose(run(config), slow_adam('inside', 1e-8, 0.3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('placement', ['inside', 'outside'])
def test_nothing_moves_a_reward_models_normalizer(placement: str) -> None:
  """Without a gradient, decay would shrink gain and bias; it leaves them and shrinks the rest."""
  params = {
    'reward_model': {
      'head': {'kernel': jnp.ones((2, 1))},
      'normalizer': {'gain': jnp.float32(1.5), 'bias': jnp.float32(-0.5)},
    }
  }
  config = OptimizerConfig(weight_decay=0.5, epsilon_placement=placement, **LARGE_RATE)
  optimizer = make_optimizer(config, 10)
  updates, _ = optimizer.update(
    jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
  )
  after = optax.apply_updates(params, updates)['reward_model']
  assert after['normalizer'] == {'gain': 1.5, 'bias': -0.5}
  np.testing.assert_allclose(after['head']['kernel'], 0.95, rtol=1e-6)


def test_clipping_is_by_the_global_norm() -> None:
  """All leaves are scaled by one factor, and only when the norm over all of them is too large."""
  optimizer = make_optimizer(OptimizerConfig(name='sgd', learning_rate=1.0, clip_norm=1.0), 10)
  for size, factor in ((1.0, 1 / 5), (0.1, 1.0)):
    gradients = {'a': jnp.array([3.0 * size]), 'b': jnp.array([[4.0 * size]])}
    updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
    np.testing.assert_allclose(updates['a'], [-3.0 * size * factor], rtol=1e-6)
    np.testing.assert_allclose(updates['b'], [[-4.0 * size * factor]], rtol=1e-6)


def test_zero_clip_norm_clips_nothing() -> None:
  """Plain gradient descent at the schedule's rate."""
  config = OptimizerConfig(name='sgd', learning_rate=0.5, clip_norm=0.0, schedule='linear')
  expected = [-0.5 * (1 - t / STEPS) * GRADIENTS[t] for t in range(STEPS)]
  np.testing.assert_allclose(run(config), START + np.cumsum(expected, 0), rtol=1e-5)


@pytest.mark.parametrize(
  ('settings', 'field'),
  [
    ({'name': 'adam'}, 'name'),
    ({'schedule': 'step'}, 'schedule'),
    ({'epsilon_placement': 'middle'}, 'epsilon_placement'),
    ({'learning_rate': 0.0}, 'learning_rate'),
    ({'learning_rate': float('nan')}, 'learning_rate'),
    ({'warmup_updates': -1}, 'warmup_updates'),
    ({'clip_norm': -1.0}, 'clip_norm'),
    ({'b1': 1.0}, 'b1'),
    ({'b2': 1.0}, 'b2'),
    ({'epsilon': 0.0}, 'epsilon'),
    ({'final_fraction': 1.5}, 'final_fraction'),
    ({'weight_decay': -0.1}, 'weight_decay'),
    ({'weight_decay': 0.1, 'name': 'rmsprop'}, 'weight_decay'),
  ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], field: str) -> None:
  """The error has the field's dotted name."""
  with pytest.raises(ConfigError) as error:
    OptimizerConfig(**settings).validate('optimizer')
  assert error.value.field == f'optimizer.{field}'
  OptimizerConfig().validate('optimizer')
