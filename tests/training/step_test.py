"""One iteration: gradients do not depend on the split, and every update is made."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.common import prng
from rlhf_jax.common.metrics import First, FirstMax, Max, Mean, Metrics, Sum
from rlhf_jax.common.prng import Stream
from rlhf_jax.training.state import TrainState
from rlhf_jax.training.step import (
  Schedule,
  accumulate_gradients,
  make_update,
  minibatch_order,
  split_rows,
)

ROWS, LENGTH = 8, 5


def make_batch() -> dict[str, Any]:
  """Rows of different lengths, one of them empty: their weights differ."""
  rng = np.random.default_rng(0)
  lengths = np.array([5, 1, 3, 0, 2, 5, 4, 1])
  return {
    'x': jnp.asarray(rng.normal(size=(ROWS, LENGTH)), jnp.float32),
    'mask': jnp.asarray(np.arange(LENGTH) < lengths[:, None]),
    'row': jnp.arange(ROWS),
  }


def token_loss(params: Any, batch: Any, key: Any) -> tuple[Mean, Metrics]:
  """A mean over tokens, not over rows."""
  errors = jnp.square(batch['x'] * params['w'] - params['b'])
  mean = Mean.of(errors, batch['mask'])
  return mean, {
    'error': mean,
    'largest': Max.of(errors, batch['mask']),
    'tokens': Sum(batch['mask'].sum()),
    'rows': Mean.of(batch['row']),
  }


KEY = jax.random.key(0)
PARAMS = {'w': jnp.linspace(0.5, 1.5, LENGTH), 'b': jnp.float32(0.3)}


@pytest.mark.parametrize('parts', [1, 2, 4, 8])
def test_microbatches_do_not_change_gradients(parts: int) -> None:
  """Gradient, loss and metrics of the token-weighted mean, from the definition, for any split."""
  batch = make_batch()
  gradients, mean, metrics = jax.jit(
    lambda params, batch: accumulate_gradients(token_loss, params, batch, parts, KEY)
  )(PARAMS, batch)
  x, mask = np.asarray(batch['x'], np.float64), np.asarray(batch['mask'])
  w, b = np.asarray(PARAMS['w'], np.float64), float(PARAMS['b'])
  errors = np.where(mask, x * w - b, 0)
  count = mask.sum()
  np.testing.assert_allclose(gradients['w'], (2 * errors * x).sum(0) / count, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(gradients['b'], -2 * errors.sum() / count, rtol=1e-5)
  np.testing.assert_allclose(mean.value(), np.square(errors).sum() / count, rtol=1e-6)
  values = metrics_lib.values(metrics)
  assert values['largest'] == pytest.approx(np.square(errors).max())
  assert values['tokens'] == count and values['rows'] == 3.5
  assert values['error'] == pytest.approx(float(mean.value()))


def test_a_batch_without_a_token_has_zero_gradient() -> None:
  batch = {**make_batch(), 'mask': jnp.zeros((ROWS, LENGTH), bool)}
  gradients, mean, _ = accumulate_gradients(token_loss, PARAMS, batch, 2, KEY)
  assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))
  assert float(mean.value()) == 0


@pytest.mark.parametrize('parts', [1, 2, 4])
def test_a_split_keeps_every_row_and_takes_from_every_block(parts: int) -> None:
  """Blocks of rows lie on different devices: each part takes equally many from each of them."""
  split = np.asarray(split_rows(jnp.arange(ROWS), parts))
  assert split.shape == (parts, ROWS // parts)
  assert sorted(split.ravel()) == list(range(ROWS))
  blocks = ROWS // parts
  for part in split:
    assert sorted(part // parts) == list(range(blocks))


@pytest.mark.parametrize(('epochs', 'minibatches'), [(1, 4), (3, 2)])
def test_every_epoch_is_a_permutation(epochs: int, minibatches: int) -> None:
  """Each row is in one minibatch of each epoch; epochs and keys differ in their order."""
  schedule = Schedule(epochs=epochs, minibatches=minibatches)
  order = np.asarray(minibatch_order(jax.random.key(0), 32, schedule))
  assert order.shape == (epochs * minibatches, 32 // minibatches)
  passes = order.reshape(epochs, 32)
  for one in passes:
    assert sorted(one) == list(range(32))
  assert len({tuple(one) for one in passes}) == epochs
  assert not np.array_equal(order, minibatch_order(jax.random.key(1), 32, schedule))


def test_a_minibatch_of_all_rows_keeps_their_order() -> None:
  """The samples of a prompt stay adjacent, so that it can be read once."""
  order = minibatch_order(jax.random.key(0), 32, Schedule(epochs=3))
  np.testing.assert_array_equal(order, np.tile(np.arange(32), (3, 1)))


def visit_loss(params: Any, batch: Any, key: Any) -> tuple[Mean, Metrics]:
  """Its gradient counts visits: each row's parameter has slope -1 whenever the row is seen."""
  seen = params['visits'][batch['row']]
  mean = Mean(-seen.sum(), jnp.float32(seen.size))
  return mean, {
    'start': FirstMax(batch['row'].max().astype(jnp.float32)),
    'deviation': FirstMax(jnp.abs(seen).max()),
  }


@pytest.mark.parametrize(
  ('epochs', 'minibatches', 'accumulation'), [(1, 1, 2), (4, 1, 1), (1, 2, 1), (3, 4, 2)]
)
def test_all_updates_are_made_and_every_row_is_seen_in_every_epoch(
  epochs: int, minibatches: int, accumulation: int
) -> None:
  """epochs x minibatches optimizer updates; each row moves its parameter once an epoch."""
  schedule = Schedule(epochs, minibatches, accumulation)
  # Counts its updates, and moves a row's parameter by 1 against a slope of -1 / rows.
  optimizer = optax.chain(
    optax.scale_by_schedule(lambda count: 1.0), optax.scale(-float(ROWS // minibatches))
  )
  state = TrainState.create({'visits': jnp.zeros(ROWS)}, optimizer, 0, {})
  update = jax.jit(make_update(visit_loss, optimizer, lambda count: 10.0 + count, schedule))
  for step in range(2):
    state, metrics = update(state, make_batch())
    updates = (step + 1) * epochs * minibatches
    assert int(state.step) == step + 1 and int(state.opt_state[0].count) == updates
    np.testing.assert_allclose(state.params['visits'], np.full(ROWS, (step + 1) * epochs))
    values = metrics_lib.values(metrics)
    assert values['learning_rate'] == 10.0 + step * epochs * minibatches
    assert values['deviation'] == step * epochs, 'of the first update alone, before it moved'


def test_metrics_of_the_first_update_cover_all_its_microbatches() -> None:
  """A maximum over the first minibatch, whatever it is split into."""
  found = set()
  for accumulation in (1, 2, 4):
    schedule = Schedule(1, 2, accumulation)
    state = TrainState.create({'visits': jnp.zeros(ROWS)}, optax.sgd(1.0), 0, {})
    update = jax.jit(make_update(visit_loss, optax.sgd(1.0), lambda count: 1.0, schedule))
    found.add(metrics_lib.values(update(state, make_batch())[1])['start'])
  order = minibatch_order(state.stream(Stream.MINIBATCHES), ROWS, Schedule(1, 2, 1))
  assert found == {float(order[0].max())}


def target_loss(params: Any, batch: Any, key: Any) -> tuple[Mean, Metrics]:
  """Half the squared distance of each row's product with w to its product with the target."""
  errors = batch['x'] @ params['w'] - batch['x'] @ params['w_target'] - 1.0
  return Mean.of(0.5 * jnp.square(errors)), {}


@pytest.mark.parametrize('schedule', [Schedule(), Schedule(2, 2, 2)], ids=['one', 'several'])
def test_targets_are_constants_that_follow_every_update(schedule: Schedule) -> None:
  """By NumPy: SGD on w alone, then Polyak averaging, `epochs * minibatches` times."""
  batch, rate, slowness = make_batch(), 0.1, 0.75
  optimizer = optax.sgd(rate)
  start = {'w': jnp.linspace(0.5, 1.5, LENGTH)}, {'w_target': jnp.ones(LENGTH)}
  state = TrainState.create(start[0], optimizer, 0, {}, start[1])

  def move(targets: Any, params: Any) -> Any:
    return {'w_target': slowness * targets['w_target'] + (1 - slowness) * params['w']}

  order = np.arange(ROWS)[None]
  if schedule != Schedule():
    order = np.asarray(minibatch_order(state.stream(Stream.MINIBATCHES), ROWS, schedule))
  w, target = (np.asarray(tree, np.float64) for one in start for tree in one.values())
  for rows in order:
    x = np.asarray(batch['x'], np.float64)[rows]
    w = w - rate * x.T @ (x @ (w - target) - 1.0) / len(rows)
    target = slowness * target + (1 - slowness) * w
  updates = (
    make_update(target_loss, optimizer, lambda count: rate, schedule, m) for m in (move, None)
  )
  moved, kept = (jax.jit(update)(state, batch)[0] for update in updates)
  np.testing.assert_allclose(moved.params['w'], w, rtol=1e-5)
  np.testing.assert_allclose(moved.targets['w_target'], target, rtol=1e-5)
  np.testing.assert_array_equal(kept.targets['w_target'], start[1]['w_target'])


def test_metrics_survive_json_exactly() -> None:
  """Totals and weights, extremes and counts: merging goes on as if nothing had been written."""
  metrics: Metrics = {
    'mean': Mean(jnp.float32(1 / 3), jnp.float32(7)),
    'max': Max(jnp.float32(-jnp.inf)),
    'first': First(jnp.float32(1e-30)),
    'first_max': FirstMax(jnp.float32(0.1)),
    'tokens': Sum(jnp.int32(123456789)),
  }
  again = metrics_lib.from_json(metrics_lib.to_json(metrics))
  assert {name: type(metric) for name, metric in again.items()} == {
    name: type(metric) for name, metric in metrics.items()
  }
  for one, other in zip(jax.tree.leaves(metrics), jax.tree.leaves(again), strict=True):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other)
  more: Metrics = {'mean': Mean(jnp.float32(0.7), jnp.float32(3))}
  first, second = (metrics_lib.merge([x, more])['mean'] for x in (metrics, again))
  np.testing.assert_array_equal(first.value(), second.value())


def draw_loss(params: Any, batch: Any, key: Any) -> tuple[Mean, Metrics]:
  """Its gradient is the number that was drawn."""
  return Mean.of(params['w'] * jax.random.uniform(key) * jnp.ones_like(batch['row'])), {}


def test_every_microbatch_of_every_update_has_a_key_of_its_own() -> None:
  """Mean and update numbers differ; the same step draws the same again, and another step others."""
  optimizer = optax.sgd(1.0)
  update = jax.jit(make_update(draw_loss, optimizer, lambda count: 1.0, Schedule(2, 2, 2)))
  rows = {'row': jnp.arange(8.0)}

  def moved(step: int) -> float:
    state = TrainState.create({'w': jnp.float32(0)}, optimizer, 0, {})
    state, _ = update(dataclasses.replace(state, step=jnp.int32(step)), rows)
    return float(state.params['w'])

  drawn = jax.grad(lambda w, key: draw_loss({'w': w}, rows, key)[0].value())
  key = prng.stream_key(prng.base_key(0), prng.Stream.DROPOUT, 3)
  keys = [
    part for number in range(4) for part in jax.random.split(jax.random.fold_in(key, number), 2)
  ]
  draws = [float(drawn(0.0, key)) for key in keys]
  assert len(set(draws)) == 8
  assert moved(3) == pytest.approx(-sum(draws) / 2, rel=1e-6)
  assert moved(3) == moved(3) != moved(4)
