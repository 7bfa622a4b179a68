"""The one training loop: step, log, evaluate, checkpoint, stop cleanly, go on exactly."""

import collections
import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.common import files, processes
from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.common.errors import HealthError, NonFiniteError
from rlhf_jax.common.metrics import Metrics
from rlhf_jax.training import dumps
from rlhf_jax.training.checkpoints import Checkpoints
from rlhf_jax.training.health import HealthConfig
from rlhf_jax.training.monitors import OF_EVALUATIONS, Event, Monitors
from rlhf_jax.training.progress import Progress
from rlhf_jax.training.recipe import Prepared, Recipe
from rlhf_jax.training.state import TrainState
from rlhf_jax.training.stopping import Interrupted, StopRequest
from rlhf_jax.training.writers import JsonlWriter, PrefixedWriter, TensorBoardWriter, Writer


class LoopConfig(NamedTuple):
  """How long, and how often.

  Attributes:
    steps: iterations in all.
    log_every: iterations merged into one row of metrics.
    evaluate_every: iterations between evaluations; 0 evaluates at the start and at the end only.
    checkpoint_every: iterations between checkpoints; 0 writes the last only.
    checkpoint_evaluations: whether a checkpoint is written at each evaluation as well.
    tensorboard: whether TensorBoard files are written beside the JSON lines.
    health: what is done about numbers that are not finite, and what is watched.
    samples: whether the policy learns from its own samples, whose metrics are watched then.
  """

  steps: int
  log_every: int
  evaluate_every: int
  checkpoint_every: int
  checkpoint_evaluations: bool
  tensorboard: bool
  health: HealthConfig = HealthConfig()
  samples: bool = False


class Outcome(NamedTuple):
  """The state at the end; what was seen on the way; whether a signal ended it early."""

  state: TrainState
  tokens: int
  seconds: float
  stopped: bool
  skipped_updates: int = 0


class _Pending(NamedTuple):
  """A step whose metrics are still being computed."""

  step: int
  prepared: Prepared
  metrics: Metrics


class _Run:
  """The bookkeeping of one call of `train`."""

  def __init__(
    self,
    name: str,
    recipe: Recipe,
    config: LoopConfig,
    folder: pathlib.Path,
    checkpoints: Checkpoints,
  ):
    self.recipe, self.config, self.folder, self.checkpoints = recipe, config, folder, checkpoints
    self.tokens, self.seconds = 0, 0.0
    self.start = 0
    self.owes_evaluation = False  # of the step that it starts from
    self.final: TrainState | None = None  # as the last checkpoint has it
    self.window: Metrics = {}
    self.monitors = Monitors(config.health)
    self.halt: Event | None = None  # the first that asks for the end of the run
    processes.check_same('latest checkpoints', str(checkpoints.latest_step))
    if checkpoints.latest_step is None:
      self.state = recipe.init()
    else:
      self.state, facts = checkpoints.restore(recipe.abstract)
      self.start = int(self.state.step)
      self.tokens, self.seconds = int(facts['tokens']), float(facts['seconds'])
      self.owes_evaluation = bool(facts.get('owes_evaluation'))
      self.window = metrics_lib.from_json(facts['window'])
      self.monitors = Monitors(config.health, facts.get('health'))
      processes.say(f'{name}: going on from step {self.start}')
    self.metrics: list[Writer] = []
    self.evaluations: list[Writer] = []
    self.health: list[Writer] = []
    if processes.is_main():
      self.open_writers()
    self.progress = Progress(name, config.steps, self.start, self.tokens)
    self.pending: collections.deque[_Pending] = collections.deque()
    self.clock = time.monotonic()

  def open_writers(self) -> None:
    """Opens the files of metrics, without rows of steps that are still to come."""
    keep = self.start if self.start else -1
    self.metrics.append(JsonlWriter(self.folder / 'metrics.jsonl', keep_through=keep))

    def rows(name: str, stale: Callable[[Mapping[str, Any]], bool]) -> JsonlWriter:
      # An evaluation that is owed may have been made, and lost: it is made again.
      owed = stale if self.owes_evaluation else lambda row: False
      return JsonlWriter(self.folder / name, keep_through=keep, stale=owed)

    self.evaluations.append(rows('evaluations.jsonl', lambda row: True))
    self.health.append(rows('health.jsonl', lambda row: row.get('monitor') in OF_EVALUATIONS))
    if self.config.tensorboard:
      board = TensorBoardWriter(self.folder / 'tensorboard', keep_through=keep)
      self.metrics.append(board)
      self.evaluations.append(PrefixedWriter(board, 'evaluation/'))

  def step(self, step: int, stop: StopRequest) -> None:
    """Dispatches one iteration, and settles the one before."""
    with stop.interruptible():
      prepared = self.recipe.prepare(self.state, self.recipe.batch(step))
    self.state, metrics = self.recipe.update(
      dataclasses.replace(self.state, carry=prepared.carry), prepared.batch
    )
    metrics = {**prepared.metrics, **metrics}
    self.pending.append(_Pending(step + 1, prepared, metrics))
    if len(self.pending) > 1:  # one step behind, so that the host never waits for the device
      self.settle(self.pending.popleft())

  def go(self, stop: StopRequest) -> bool:
    """Goes on from `start` to the end; whether it was stopped before that, with its state saved."""
    config, checkpoints = self.config, self.checkpoints
    if self.start == 0:
      with stop.interruptible():
        first = self.evaluate(0)
      checkpoints.require_metric(first)
    elif self.owes_evaluation:
      with stop.interruptible():
        self.evaluate(self.start)
    for step in range(self.start, config.steps):
      self.step(step, stop)
      done = step + 1
      last = done == config.steps
      if step == self.start:  # it compiles: there is nothing to be gained by running ahead
        self.settle_all()
      stopping = stop.due() and not last
      scalars = None
      self.owes_evaluation = last or _due(done, config.evaluate_every)
      needed = last or config.checkpoint_evaluations  # in the checkpoint itself
      # There may be little time to stop in: an evaluation that is not needed is left for later.
      if self.owes_evaluation and (needed or not stopping):
        self.settle_all()
        with contextlib.nullcontext() if needed else stop.interruptible():
          scalars = self.evaluate(done)
      if (
        last
        or stopping
        or self.halt is not None
        or _due(done, config.checkpoint_every)
        or (scalars is not None and config.checkpoint_evaluations)
      ):
        self.settle_all()
        self.save(done, scalars)
      if self.halt is not None and not last:
        raise self.halted(self.halt)
      if stopping:
        return True
    return False

  def rescue(self) -> None:
    """Saves what is complete, of a step or an evaluation that was given up in the middle."""
    self.settle_all()
    if done := int(self.state.step):
      self.save(done, None)
    if self.halt is not None:
      raise self.halted(self.halt)

  def settle_all(self) -> None:
    """Waits for the metrics of every step that was dispatched."""
    while self.pending:
      self.settle(self.pending.popleft())

  def settle(self, done: _Pending) -> None:
    """Reads the metrics of a step: skips or stops at what is not finite, counts, logs."""
    values = metrics_lib.values(done.metrics)
    now = time.monotonic()
    self.seconds += now - self.clock
    self.clock = now
    finite = all(np.isfinite(values[name]) for name in ('loss', 'gradient_norm'))
    finite = finite and not values.get('nonfinite_rewards', 0)
    reason = '' if finite else dumps.reason(values, done.prepared)
    if not finite and self.config.health.nonfinite == 'stop':
      self.give_up(done, values, reason, 'nonfinite=skip')
    events = self.monitors.see_step(done.step, values, reason or 'a gradient norm is a spike')
    self.tell(events)
    for event in events:
      if event.action == 'stop':
        spike = event.monitor == 'gradient_spike'
        self.give_up(done, values, event.text, 'gradient_spike.action=skip' if spike else '')
    if values.get('skipped_updates', 0) and self.monitors.skipped_steps == 1:
      dumps.save(self.folder, done.step, done.prepared, values)
    self.tokens += int(values['tokens'])
    metrics = done.metrics
    if not finite:  # the others of its row still have something to say
      metrics = {name: metrics[name] for name in metrics if np.isfinite(values[name])}
    self.window = metrics_lib.merge([self.window, metrics])
    if done.step == self.start + 1:
      self.progress.compiled(done.step, self.tokens)
    if done.step == self.config.steps or _due(done.step, self.config.log_every):
      self.log(done.step)

  def give_up(self, done: _Pending, values: dict[str, float], reason: str, remedy: str) -> None:
    """Saves what is needed to study the step, and raises; `remedy` is of `config.health`."""
    path = dumps.save(self.folder, done.step, done.prepared, values)
    latest = self.checkpoints.latest_step
    good = (
      'there is no checkpoint' if latest is None else f'the last good checkpoint is step {latest}'
    )
    among = f', among them --config.health.{remedy} in another --workdir' if remedy else ''
    raise NonFiniteError(
      f'{self.folder}: step {done.step}: {reason}. The batch and the metrics of that step are in '
      f'{path} and {path.with_suffix(".json")}; {good}. '
      f'python -m experiments.replay --run={self.folder} makes the step again and says where it '
      f'goes wrong; docs/health.md has remedies{among}.'
    )

  def tell(self, events: Sequence[Event]) -> None:
    """Writes and says what the monitors found, and keeps the first that asks for the end."""
    for event in events:
      for writer in self.health:
        writer.write(event.step, event.row())
      if event.action != 'stop':
        processes.say(f'warning: {self.folder}: step {event.step}: {event.text} ({event.monitor})')
      elif self.halt is None:
        self.halt = event

  def log(self, step: int) -> None:
    """Writes and shows the metrics merged since the last row; the next step is under way."""
    values = metrics_lib.values(self.window)
    row = {**values, 'tokens': self.tokens, 'seconds': round(self.seconds, 3)}
    for writer in self.metrics:
      writer.write(step, row)
    shown = {name: values[name] for name in self.recipe.shown if name in values}
    if processes.is_main():
      self.progress.line(step, self.tokens, shown)
    self.window = {}
    if self.config.samples:
      self.tell(self.monitors.see_row(step, values))

  def evaluate(self, step: int) -> dict[str, float]:
    """Asks the recipe's questions and writes the answers."""
    scalars, arrays = self.recipe.evaluate(self.state.by_role, step)
    if arrays and processes.is_main():
      folder = self.folder / 'evaluations'
      folder.mkdir(exist_ok=True)
      files.write_arrays(folder / f'{step:08}.npz', arrays)
    row = {**scalars, 'tokens': self.tokens, 'seconds': round(self.seconds, 3)}
    for writer in self.evaluations:
      writer.write(step, row)
    self.tell(self.monitors.see_evaluation(step, scalars, arrays))
    self.owes_evaluation = False
    self.skip_time()
    return scalars

  def skip_time(self) -> None:
    """Evaluation and checkpointing do not count as training time."""
    self.clock = time.monotonic()
    self.progress.skip()

  def save(self, step: int, scalars: dict[str, float] | None) -> None:
    """Writes a checkpoint."""
    # With the metrics of the steps since the last row: the next row is then as if undisturbed.
    window = metrics_lib.to_json(self.window)
    facts = {
      'tokens': self.tokens,
      'seconds': self.seconds,
      'window': window,
      'health': self.monitors.facts(),
      'owes_evaluation': self.owes_evaluation,
    }
    # Another stage may start from a checkpoint that was evaluated: it gets the last touch too.
    state = self.state if scalars is None else self.recipe.finish(self.state)
    self.final = state if step == self.config.steps else None
    for writer in self.writers:
      writer.sync()
    self.checkpoints.save(step, state, facts, scalars)
    self.skip_time()

  def halted(self, halt: Event) -> HealthError:
    """The error of a monitor that asked for the end; the state has just been saved."""
    return HealthError(
      f'{self.folder}: step {halt.step}: {halt.text} (health.{halt.monitor}.limit {halt.limit:g}, '
      f"action 'stop'). The state of step {int(self.state.step)} is saved. The same command goes "
      'on from it in spite of this, and stops again only if the value comes back and crosses the '
      'limit anew; docs/health.md says what may help instead.'
    )

  def outcome(self, state: TrainState, *, stopped: bool) -> Outcome:
    """What the loop returns."""
    return Outcome(state, self.tokens, self.seconds, stopped, self.monitors.skipped_updates)

  @property
  def writers(self) -> list[Writer]:
    return [*self.metrics, *self.evaluations, *self.health]

  def close(self) -> None:
    try:
      for writer in self.writers:
        writer.close()
    finally:
      self.recipe.close()


def _due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


def train(
  name: str, recipe: Recipe, config: LoopConfig, folder: pathlib.Path, checkpoints: Checkpoints
) -> Outcome:
  """Runs a recipe from its latest checkpoint, or from the start, to the end.

  The same call after an interruption goes on where the last checkpoint was written, and gives the
  same bits as an undisturbed run.

  Raises:
    NonFiniteError: a loss, gradient or reward was not finite; the step's batch and metrics were
      saved.
    HealthError: a monitor stopped the run after its state had been saved.
    ConfigError: evaluations do not give the metric by which checkpoints are to be compared.
  """
  run = _Run(name, recipe, config, folder, checkpoints)
  try:
    with StopRequest() as stop:
      try:
        stopped = run.go(stop)
      except Interrupted:
        stopped = True
        run.rescue()
      checkpoints.wait()  # here, where no second signal ends it
      if stopped:
        stop.honoured = True
        return run.outcome(run.state, stopped=True)
    if run.halt is not None:  # at the end there is nothing left to stop
      processes.say(f'warning: {run.folder}: step {run.halt.step}: {run.halt.text}')
    final = run.state if run.final is None else run.final
    return run.outcome(final, stopped=False)
  finally:
    run.close()
