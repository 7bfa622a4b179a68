"""An update that is left out leaves no trace; spikes are told from the level of the gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.common import trees
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.metrics import Mean, Metrics
from rlhf_jax.common.prng import Stream
from rlhf_jax.training.health import USABLE, HealthConfig, MonitorConfig, SpikeConfig
from rlhf_jax.training.state import TrainState
from rlhf_jax.training.step import Schedule, make_update, minibatch_order

OPTIMIZER = optax.adam(optax.linear_schedule(0.1, 0.05, 10))
ROWS, ONE = 8, Schedule()


def loss(params: Any, batch: Any, key: Any) -> tuple[Mean, Metrics]:
  """Squared distance; its gradient norm grows with `scale`."""
  errors = batch['scale'] * jnp.square(params['w'] - params['slow'] - batch['x'])
  return Mean.of(errors), {'error': Mean.of(errors)}


def move(targets: Any, params: Any) -> Any:
  return {'slow': optax.incremental_update(params['w'], targets['slow'], 0.3)}


def start(health: HealthConfig, **carry: float) -> TrainState:
  values = {**health.carry(), **carry}
  values = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
  return TrainState.create(
    {'w': jnp.float32(1.0)}, OPTIMIZER, 0, values, {'slow': jnp.float32(0.5)}
  )


def make(health: HealthConfig, schedule: Schedule = ONE) -> Any:
  rate = optax.linear_schedule(0.1, 0.05, 10)
  return jax.jit(make_update(loss, OPTIMIZER, rate, schedule, move, health), donate_argnums=0)


def batch_of(number: int, **changes: Any) -> dict[str, Any]:
  x = np.random.default_rng(number).normal(size=ROWS).astype(np.float32)
  return {'x': jnp.asarray(x), 'scale': jnp.ones(ROWS), **changes}


SKIP = HealthConfig(nonfinite='skip')


@pytest.mark.parametrize('bad', ['nan loss', 'inf gradient', 'unusable'])
def test_a_skipped_update_leaves_no_trace(bad: str) -> None:
  """Batches 0, bad, 2 end with the bits of batches 0, 2: parameters, moments, counts, targets."""
  update = make(SKIP)
  batch = batch_of(1)
  if bad == 'nan loss':
    batch['x'] = batch['x'].at[3].set(np.nan)
  if bad == 'inf gradient':
    batch['scale'] = batch['scale'] * 3e38  # the loss is infinite as well

  def run(batches: list[Any], usable: list[float]) -> tuple[TrainState, list[dict[str, float]]]:
    state, rows = start(SKIP, **{USABLE: 1.0}), []
    for one, may in zip(batches, usable, strict=True):
      state = state.replace(carry={**state.carry, USABLE: jnp.float32(may)})  # type: ignore[attr-defined]
      state, metrics = update(state, one)
      rows.append(metrics_lib.values(metrics))
    return state, rows

  found, rows = run([batch_of(0), batch, batch_of(2)], [1, 0 if bad == 'unusable' else 1, 1])
  expected, other = run([batch_of(0), batch_of(2)], [1, 1])
  for part in ('params', 'opt_state', 'targets'):
    assert trees.sha256(getattr(found, part)) == trees.sha256(getattr(expected, part)), part
  assert [row['skipped_updates'] for row in rows] == [0, 1, 0]
  assert rows[2]['loss'] == other[1]['loss']
  assert rows[2]['learning_rate'] == other[1]['learning_rate'], 'the schedule counts updates made'
  assert int(found.step) == 3


@pytest.mark.parametrize('accumulation', [1, 2])
def test_the_other_minibatches_of_a_step_are_learnt_from(accumulation: int) -> None:
  """One row is bad: the minibatch that holds it is left out in each epoch, the rest by hand.

  Whole minibatches are, though only one of their microbatches is bad.
  """
  schedule = Schedule(2, 4, accumulation)
  state = start(SKIP)
  order = np.asarray(minibatch_order(state.stream(Stream.MINIBATCHES), ROWS, schedule))
  batch = batch_of(0)
  batch['x'] = batch['x'].at[5].set(np.inf)
  params, slow, opt_state = {'w': jnp.float32(1.0)}, jnp.float32(0.5), state.opt_state
  for rows in order:
    if 5 in rows:
      continue
    x = batch['x'][rows]
    gradient = jax.grad(lambda p, x=x, slow=slow: jnp.square(p['w'] - slow - x).mean())(params)
    moves, opt_state = OPTIMIZER.update(gradient, opt_state, params)
    params = optax.apply_updates(params, moves)
    slow = optax.incremental_update(params['w'], slow, 0.3)
  found, metrics = make(SKIP, schedule)(state, batch)
  np.testing.assert_allclose(found.params['w'], params['w'], rtol=1e-6)
  np.testing.assert_allclose(found.targets['slow'], slow, rtol=1e-6)
  assert metrics_lib.values(metrics)['skipped_updates'] == 2
  assert int(found.opt_state[0].count) == 6


def test_a_guard_that_has_nothing_to_do_changes_no_bit() -> None:
  """The same steps under 'stop', under 'skip', and with an eye on spikes.

  Operation by operation: some processors round a sum of products in one program and not in another.
  """
  found = set()
  for health in (HealthConfig(), SKIP, HealthConfig(gradient_spike=SpikeConfig(factor=1e6))):
    with jax.disable_jit():
      update, state = make(health, Schedule(1, 2)), start(health)
      for number in range(3):
        state, _ = update(state, batch_of(number))
    found.add(trees.sha256((state.params, state.opt_state, state.targets)))
  assert len(found) == 1


@pytest.mark.parametrize('action', ['warn', 'skip'])
def test_a_spike_is_told_from_the_median_of_the_last_updates(action: str) -> None:
  """The 6th gradient is 100 times the others: it counts, and is skipped where that was asked."""
  spike = SpikeConfig(factor=10.0, window=4, action=action)
  health = HealthConfig(gradient_spike=spike)
  update, state, rows, seen = make(health), start(health), [], []
  for number in range(8):
    # Of so little use that the distance, and with it the gradient's norm, hardly changes.
    scale = 1e-3 * (100.0 if number == 5 else 1.0)
    before = float(state.params['w'])
    batch = {'x': jnp.full(ROWS, 100.0), 'scale': jnp.full(ROWS, scale)}
    state, metrics = update(state, batch)
    rows.append(metrics_lib.values(metrics))
    seen.append(float(state.params['w']) != before)
  assert [row['gradient_spikes'] for row in rows] == [0, 0, 0, 0, 0, 1, 0, 0]
  assert rows[5]['gradient_spike_ratio'] == pytest.approx(100, rel=0.05)
  assert rows[3]['gradient_spike_ratio'] == 0, 'judged before the window was full'
  assert seen == [True] * 5 + [action == 'warn'] + [True] * 2
  norms = [row['gradient_norm'] for row in rows]
  np.testing.assert_allclose(state.carry['gradient_norms'], norms[-4:], rtol=1e-6)


def test_where_most_gradients_are_none_no_other_is_a_spike() -> None:
  """As with rewards that are mostly all alike."""
  health = HealthConfig(gradient_spike=SpikeConfig(factor=10.0, window=4, action='skip'))
  update, state, spikes = make(health), start(health), []
  for number in range(8):
    scale = 1.0 if number in (2, 5, 6) else 0.0
    state, metrics = update(
      state, {'x': jnp.full(ROWS, 100.0), 'scale': jnp.full(ROWS, scale * 1e-3)}
    )
    spikes.append(metrics_lib.values(metrics)['gradient_spikes'])
  assert spikes == [0] * 8


@pytest.mark.parametrize(
  ('config', 'words'),
  [
    (HealthConfig(nonfinite='ignore'), 'health.nonfinite'),
    (HealthConfig(max_skipped=-1), 'health.max_skipped'),
    (HealthConfig(gradient_spike=SpikeConfig(factor=0.5)), 'health.gradient_spike.factor'),
    (HealthConfig(gradient_spike=SpikeConfig(window=1)), 'health.gradient_spike.window'),
    (HealthConfig(gradient_spike=SpikeConfig(action='x')), 'health.gradient_spike.action'),
    (HealthConfig(kl=MonitorConfig(limit=-1.0)), 'health.kl.limit'),
    (HealthConfig(kl=MonitorConfig(action='skip')), 'health.kl.action'),
    (HealthConfig(length=MonitorConfig(limit=0.5)), 'health.length.limit'),
    (HealthConfig(entropy=MonitorConfig(limit=1.0)), 'health.entropy.limit'),
    (HealthConfig(repetition=MonitorConfig(limit=1.0)), 'health.repetition.limit'),
    (HealthConfig(disagreement=MonitorConfig(limit=0.5)), 'health.disagreement.limit'),
  ],
)
def test_what_cannot_work_is_refused(config: HealthConfig, words: str) -> None:
  HealthConfig().validate('health')
  with pytest.raises(ConfigError, match=words):
    config.validate('health')
