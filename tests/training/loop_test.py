"""The loop: interrupted runs end as undisturbed ones, rows are neither lost nor doubled."""

import dataclasses
import json
import os
import pathlib
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.common import trees
from rlhf_jax.common.errors import ConfigError, NonFiniteError
from rlhf_jax.common.metrics import Mean, Sum
from rlhf_jax.config import EvaluationConfig
from rlhf_jax.objectives.dpo import DPOConfig
from rlhf_jax.training import loop
from rlhf_jax.training.checkpoints import CheckpointConfig, Checkpoints
from rlhf_jax.training.optimizer import OptimizerConfig
from rlhf_jax.training.recipe import Evaluation, Prepared, Recipe
from rlhf_jax.training.state import TrainState
from rlhf_jax.training.step import Schedule, make_update
from rlhf_jax.training.writers import read_rows
from tests import tiny

EVALUATION = EvaluationConfig(every=4, prompts=8, records=8, batch_size=tiny.ROWS)


def terminated_at(step: int, *, times: int = 1, evaluating: bool = False) -> Any:
  """A recipe's wrapper that sends this process SIGTERMs in the middle of a step, or of what asks
  about the policy after it.
  """

  def wrap(recipe: Recipe) -> Recipe:
    def at(here: bool) -> None:
      for _ in range(times if here else 0):
        os.kill(os.getpid(), signal.SIGTERM)

    def batch(number: int) -> Any:
      at(number == step - 1 and not evaluating)
      return recipe.batch(number)

    def evaluate(params: Any, number: int) -> Evaluation:
      at(number == step and evaluating)
      return recipe.evaluate(params, number)

    return recipe._replace(batch=batch, evaluate=evaluate)

  return wrap


def killed_at(step: int) -> Any:
  """A recipe's wrapper that breaks off at the start of a step, with nothing saved."""

  def wrap(recipe: Recipe) -> Recipe:
    def batch(number: int) -> Any:
      if number == step:
        raise KeyboardInterrupt
      return recipe.batch(number)

    return recipe._replace(batch=batch)

  return wrap


def rows(folder: pathlib.Path, name: str) -> list[dict[str, Any]]:
  """The rows of a metrics file without the one thing that may differ, wall seconds."""
  found = read_rows(folder / f'{name}.jsonl')
  assert all(row.pop('seconds') >= 0 for row in found)
  return found


def same_run(folder: pathlib.Path, expected: pathlib.Path) -> None:
  """Demands the same metrics, evaluations, answers and result."""
  for name in ('metrics', 'evaluations'):
    assert rows(folder, name) == rows(expected, name)
  assert read_rows(folder / 'health.jsonl') == read_rows(expected / 'health.jsonl')
  answers = sorted((expected / 'evaluations').glob('*'))
  assert [path.name for path in answers] == [
    path.name for path in sorted((folder / 'evaluations').glob('*'))
  ]
  for path in answers:
    with np.load(path) as first, np.load(folder / 'evaluations' / path.name) as second:
      assert first.files == second.files
      for name in first.files:
        np.testing.assert_array_equal(first[name], second[name])
  results = [json.loads((x / 'result.json').read_text()) for x in (folder, expected)]
  for result in results:
    for part in (result, result['metrics'], result['evaluation']):
      del part['seconds']
  assert results[0] == results[1]


# The loop is the same for all (tests/recipes/resume_test.py has what differs): from given responses
# and from samples, with a reference, a finish, a controller, slow copies.
LOOPS = ('sft', 'reward_model', 'dpo', 'cpl', 'ilql', 'ppo')


@pytest.mark.slow
@pytest.mark.parametrize('case', LOOPS)
def test_a_run_stopped_after_5_of_10_steps_ends_as_if_undisturbed(
  case: str, parents: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """Stopped by SIGTERM within step 5, then run again: every bit of state, every row is the same.

  Rows are written every 2 steps: the one of step 6 is half made when the signal comes. Parameters,
  optimizer state, KL coefficient, key and data position are all in the state.
  """
  evaluation = (
    EVALUATION if case in ('reward_model', 'ppo') else dataclasses.replace(EVALUATION, prompts=0)
  )
  optimizer = OptimizerConfig(learning_rate=1e-2, schedule='cosine', warmup_updates=2)
  config = tiny.make_config(case, parents, evaluation=evaluation, optimizer=optimizer)
  if case == 'reward_model':  # also which checkpoint is the best; its finish is in one that goes on
    config.checkpoint = CheckpointConfig(every=0, keep=1, best_metric='held_out_accuracy')
  whole = tiny.run_stage(config, tmp_path / 'whole')
  assert not whole.outcome.stopped and int(whole.loop.state.step) == 10

  half = tiny.run_stage(config, tmp_path / 'parts', wrap=terminated_at(5))
  assert half.outcome.stopped and int(half.loop.state.step) == 5
  assert half.outcome.run.result is None
  assert [row['step'] for row in rows(tmp_path / 'parts', 'metrics')] == [2, 4]
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

  both = tiny.run_stage(config, tmp_path / 'parts')
  assert not both.outcome.stopped
  state, expected = trees.flatten(both.loop.state), trees.flatten(whole.loop.state)
  assert state.keys() == expected.keys()
  for name in expected:
    np.testing.assert_array_equal(state[name], expected[name], err_msg=name)
  assert [row['step'] for row in rows(tmp_path / 'parts', 'metrics')] == [2, 4, 6, 8, 10]
  assert [row['step'] for row in rows(tmp_path / 'parts', 'evaluations')] == [0, 4, 8, 10]
  same_run(tmp_path / 'parts', tmp_path / 'whole')
  if case == 'ppo':
    coefficients = [row['kl_coefficient'] for row in rows(tmp_path / 'parts', 'metrics')]
    assert len(set(coefficients)) == len(coefficients), 'the adaptive coefficient did not move'


def test_targets_resume_exactly(tmp_path: pathlib.Path) -> None:
  """A slow copy that decides the loss: 7 steps are 4 steps and 3 more; evaluations see it."""
  optimizer = optax.adam(0.1)
  seen: list[set[str]] = []

  def init() -> TrainState:
    carry = {'drift': {'total': jnp.zeros(3)}}
    start = {'w': jnp.arange(3.0)}
    return TrainState.create(start, optimizer, 0, carry, {'w_target': jnp.zeros(3)})

  def loss(params: Any, batch: jax.Array, key: jax.Array) -> Any:
    return Mean.of(jnp.square(params['w'] - 0.5 * params['w_target'] - batch)), {}

  def move(targets: Any, params: Any) -> Any:
    return {'w_target': optax.incremental_update(params['w'], targets['w_target'], 0.3)}

  def prepare(state: TrainState, batch: Any) -> Prepared:
    carry = {'drift': {'total': state.carry['drift']['total'] + state.targets['w_target']}}
    return Prepared(batch + carry['drift']['total'], carry, {'tokens': Sum(jnp.int32(1))})

  def evaluate(params: Any, step: int) -> Evaluation:
    seen.append(set(params))
    return Evaluation({}, {})

  update = jax.jit(
    make_update(loss, optimizer, lambda count: 0.1, Schedule(), move), donate_argnums=0
  )
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), init()
  )
  recipe = Recipe(
    abstract, init, lambda step: np.float32(step), prepare, update, evaluate, lambda s: s, (), {}
  )

  def run(name: str, wrap: Any = lambda recipe: recipe) -> TrainState:
    (tmp_path / name).mkdir(exist_ok=True)
    checkpoints = Checkpoints(tmp_path / name / 'checkpoints', CheckpointConfig())
    settings = loop.LoopConfig(7, 10, 0, 0, False, False)
    try:
      return loop.train(name, wrap(recipe), settings, tmp_path / name, checkpoints).state
    finally:
      checkpoints.close()

  whole, half, both = run('whole'), run('parts', terminated_at(4)), run('parts')
  assert int(half.step) == 4 and int(both.step) == 7
  assert trees.sha256(both) == trees.sha256(whole)
  assert not np.array_equal(half.targets['w_target'], both.targets['w_target'])
  assert all(roles == {'w', 'w_target'} for roles in seen) and seen


def test_a_mistaken_best_metric_costs_nothing(tmp_path: pathlib.Path) -> None:
  """The error comes before the first step, and the directory is free for the mended config."""
  evaluation = dataclasses.replace(EVALUATION, prompts=0)
  for metric in ('held_out_nlll', 'held_out_nll'):
    checkpoint = CheckpointConfig(best_metric=metric, best_mode='min')
    config = tiny.make_config('sft', steps=2, evaluation=evaluation, checkpoint=checkpoint)
    if metric == 'held_out_nll':
      assert tiny.run_stage(config, tmp_path / 'run').outcome.run.step('best') in (1, 2)
      continue
    with pytest.raises(ConfigError, match='best_metric.*held_out_nll'):
      tiny.run_stage(config, tmp_path / 'run')


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: pathlib.Path) -> None:
  """Killed in step 9 with a checkpoint at 6: rows written after 6 are made again, none twice."""
  config = tiny.make_config('sft', checkpoint=CheckpointConfig(every=3, keep=1))
  whole = tiny.run_stage(config, tmp_path / 'whole')
  with pytest.raises(KeyboardInterrupt):
    tiny.run_stage(config, tmp_path / 'parts', wrap=killed_at(8))
  with (tmp_path / 'parts' / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 10, "lo')  # cut short
  both = tiny.run_stage(config, tmp_path / 'parts')
  assert trees.sha256(both.loop.state) == trees.sha256(whole.loop.state)
  assert [row['step'] for row in rows(tmp_path / 'parts', 'metrics')] == [2, 4, 6, 8, 10]
  assert rows(tmp_path / 'parts', 'metrics') == rows(tmp_path / 'whole', 'metrics')


def test_a_run_killed_before_its_first_checkpoint_starts_anew(tmp_path: pathlib.Path) -> None:
  config = tiny.make_config('sft', steps=4)
  with pytest.raises(KeyboardInterrupt):
    tiny.run_stage(config, tmp_path / 'run', wrap=killed_at(3))
  tiny.run_stage(config, tmp_path / 'run')
  assert [row['step'] for row in rows(tmp_path / 'run', 'metrics')] == [2, 4]
  assert [row['step'] for row in rows(tmp_path / 'run', 'evaluations')] == [0, 4]


def test_a_run_killed_between_its_last_checkpoint_and_its_result_only_writes_that(
  tmp_path: pathlib.Path,
) -> None:
  config = tiny.make_config('sft', steps=4)
  whole = tiny.run_stage(config, tmp_path / 'run')
  result = whole.outcome.run.result
  (tmp_path / 'run' / 'result.json').unlink()
  again = tiny.run_stage(config, tmp_path / 'run', wrap=killed_at(0))
  assert again.outcome.run.result == result


def test_rows_merge_the_steps_between_them(tmp_path: pathlib.Path) -> None:
  """A row's loss is the token-weighted mean over its steps; its tokens are all seen so far."""
  each, pairs = (
    dataclasses.replace(
      tiny.make_config('sft', steps=4),
      log=dataclasses.replace(tiny.make_config('sft').log, every=n),
    )
    for n in (1, 2)
  )
  tiny.run_stage(each, tmp_path / 'each')
  tiny.run_stage(pairs, tmp_path / 'pairs')
  single, merged = rows(tmp_path / 'each', 'metrics'), rows(tmp_path / 'pairs', 'metrics')
  assert [row['step'] for row in merged] == [2, 4]
  for number, row in enumerate(merged):
    first, second = single[2 * number : 2 * number + 2]
    assert row['tokens'] == second['tokens']
    assert row['gradient_norm'] == pytest.approx(
      (first['gradient_norm'] + second['gradient_norm']) / 2
    )
    assert row['gradient_norm_max'] == max(first['gradient_norm'], second['gradient_norm'])
    assert row['learning_rate'] == first['learning_rate']
    low, high = sorted((first['loss'], second['loss']))
    assert low < row['loss'] < high
  assert single[0]['tokens'] == sum_of_tokens(each, 1)


@pytest.mark.parametrize('broken', [False, True])
def test_what_a_recipe_holds_is_let_go(
  broken: bool, parents: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """At the end, and when a step breaks off."""
  closed: list[int] = []

  def wrap(recipe: Recipe) -> Recipe:
    recipe = killed_at(1)(recipe) if broken else recipe
    return recipe._replace(close=lambda: closed.append(1))

  config = tiny.make_config('sft', parents, steps=2)
  if broken:
    with pytest.raises(KeyboardInterrupt):
      tiny.run_stage(config, tmp_path / 'run', wrap=wrap)
  else:
    tiny.run_stage(config, tmp_path / 'run', wrap=wrap)
  assert closed == [1]


def sum_of_tokens(config: Any, steps: int) -> int:
  """Real tokens of the first batches."""
  built = tiny.build_recipe(config)
  batches = [built.recipe.batch(step) for step in range(steps)]
  return sum(int(batch.prompt_mask.sum() + batch.response_mask.sum()) for batch in batches)


def test_a_loss_that_is_not_finite_stops_the_run(
  parents: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """The error names step, metrics and files, which hold the batch; the good checkpoint stays."""
  config = tiny.make_config(
    'dpo', parents, objective=DPOConfig(), checkpoint=CheckpointConfig(every=2)
  )
  poisoned: list[Any] = []

  def wrap(recipe: Recipe) -> Recipe:
    def prepare(state: Any, batch: Any) -> Any:
      prepared = recipe.prepare(state, batch)
      if int(state.step) != 2:
        return prepared
      logprobs = prepared.batch.reference_logprobs.at[3, 1, 0].set(np.nan)
      poisoned.append(dataclasses.replace(prepared.batch, reference_logprobs=logprobs))
      return prepared._replace(batch=poisoned[0])

    return recipe._replace(prepare=prepare)

  folder = tmp_path / 'run'
  with pytest.raises(NonFiniteError) as caught:
    tiny.run_stage(config, folder, wrap=wrap)
  batch, metrics = (folder / 'nonfinite' / f'step_00000003.{kind}' for kind in ('npz', 'json'))
  for part in ('step 3', 'loss nan', str(batch), str(metrics), 'checkpoint is step 2'):
    assert part in str(caught.value)

  def refused(constant: str) -> None:
    raise ValueError(f'{constant} is not JSON')

  values = json.loads(metrics.read_text(), parse_constant=refused)
  assert values['step'] == 3 and values['loss'] == 'nan' and values['tokens'] > 0
  with np.load(batch) as saved:
    expected = trees.flatten(poisoned[0])
    assert set(saved.files) == expected.keys()
    for name in saved.files:
      np.testing.assert_array_equal(saved[name], expected[name])
  assert json.loads(json.dumps(rows(folder, 'metrics')))[-1]['step'] == 2
  # Mended, it goes on from the good checkpoint.
  again = tiny.run_stage(config, folder)
  assert int(again.loop.state.step) == 10


def test_an_overflowing_optimizer_is_noticed(tmp_path: pathlib.Path) -> None:
  """Parameters that an absurd learning rate has thrown away stop the run at the next step."""
  config = tiny.make_config(
    'sft', optimizer=OptimizerConfig(name='sgd', learning_rate=1e38, clip_norm=0.0)
  )
  with pytest.raises(NonFiniteError, match='step 2'):
    tiny.run_stage(config, tmp_path / 'run')


def test_a_third_signal_ends_the_process_at_once() -> None:
  """Two SIGINT are requests, the next does what it would have done without the loop."""
  # A process that a script has started in the background ignores SIGINT.
  previous = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with loop.StopRequest() as stop:
      stop.honoured = True
      assert not stop.requested
      os.kill(os.getpid(), signal.SIGINT)
      assert stop.requested
      os.kill(os.getpid(), signal.SIGINT)  # nothing is interruptible here
      with pytest.raises(loop.Interrupted), stop.interruptible():
        raise AssertionError('the second signal has come already')
      with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
  finally:
    signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize(
  ('step', 'times', 'evaluating', 'best', 'saved', 'evaluated'),
  [
    (5, 2, False, '', 4, [0, 4]),
    (1, 2, False, '', None, [0]),
    (4, 1, False, '', 4, [0]),  # an evaluation is due, and left for later
    (4, 1, False, 'held_out_accuracy', 4, [0, 4]),  # what is needed to tell the best is not
    (4, 2, True, '', 4, [0]),
    (4, 1, True, '', 5, [0, 4]),
    (8, 2, True, 'held_out_accuracy', 8, [0, 4, 8]),  # and not given up
    (10, 2, False, '', 9, [0, 4, 8]),
  ],
)
def test_a_second_signal_loses_the_current_step_alone(
  step: int,
  times: int,
  evaluating: bool,
  best: str,
  saved: int | None,
  evaluated: list[int],
  tmp_path: pathlib.Path,
) -> None:
  """The step, or the evaluation, is given up, what was there before it is saved; nothing differs.

  An evaluation that is owed is made first, and once, however often the run is stopped in it.
  """
  config = tiny.make_config('reward_model', evaluation=EVALUATION)
  config.checkpoint = CheckpointConfig(every=9, keep=2, best_metric=best)
  tiny.run_stage(config, tmp_path / 'whole')
  wrap = terminated_at(step, times=times, evaluating=evaluating)
  stopped = tiny.run_stage(config, tmp_path / 'parts', wrap=wrap)
  assert stopped.outcome.stopped
  checkpoints = Checkpoints(tmp_path / 'parts' / 'checkpoints', config.checkpoint)
  assert checkpoints.latest_step == saved
  checkpoints.close()
  assert [row['step'] for row in rows(tmp_path / 'parts', 'evaluations')] == evaluated
  if 4 not in evaluated and saved == 4:  # stopped once more in the evaluation that is owed
    again = terminated_at(4, times=2, evaluating=True)
    assert tiny.run_stage(config, tmp_path / 'parts', wrap=again).outcome.stopped
    killed = killed_at(6)
    with pytest.raises(KeyboardInterrupt):
      tiny.run_stage(config, tmp_path / 'parts', wrap=killed)
  assert not tiny.run_stage(config, tmp_path / 'parts').outcome.stopped
  same_run(tmp_path / 'parts', tmp_path / 'whole')


def test_a_signal_that_comes_too_late_is_not_lost(tmp_path: pathlib.Path) -> None:
  """In the last step there is nothing to stop: the run is saved, and the process still gets it."""
  config = tiny.make_config('sft', steps=4)
  caught: list[int] = []
  previous = signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
  try:
    finished = tiny.run_stage(config, tmp_path / 'run', wrap=terminated_at(4))
  finally:
    signal.signal(signal.SIGTERM, previous)
  assert caught == [signal.SIGTERM] and not finished.outcome.stopped
  assert [row['step'] for row in rows(tmp_path / 'run', 'metrics')] == [2, 4]


def test_the_host_waits_one_step_behind(tmp_path: pathlib.Path) -> None:
  """Metrics of a step are read after the next step has been dispatched: the device never idles."""
  events: list[str] = []
  config = tiny.make_config('sft', steps=4)
  config.log.every = 2

  def wrap(recipe: Recipe) -> Recipe:
    def update(state: Any, batch: Any) -> Any:
      events.append('update')
      return recipe.update(state, batch)

    return recipe._replace(update=update)

  real = loop.metrics_lib.values

  def values(metrics: Any) -> Any:
    events.append('read')
    return real(metrics)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.metrics_lib, 'values', values)
    tiny.run_stage(config, tmp_path / 'run', wrap=wrap)
  # The first step is waited for (it compiles); rows read what is merged: that of step 2 while
  # step 3 is under way.
  assert events == (
    ['update', 'read', 'update', 'update', 'read', 'read', 'update', 'read', 'read', 'read']
  )
