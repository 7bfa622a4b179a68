"""The one training loop: step, log, evaluate, checkpoint, stop cleanly, go on exactly."""

import collections
import dataclasses
import os
import pathlib
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.common import processes
from rlhf_jax.common.errors import HealthError, NonFiniteError
from rlhf_jax.common.metrics import Metrics
from rlhf_jax.training import dumps
from rlhf_jax.training.checkpoints import Checkpoints
from rlhf_jax.training.health import HealthConfig
from rlhf_jax.training.monitors import Event, Monitors
from rlhf_jax.training.progress import Progress
from rlhf_jax.training.recipe import Prepared, Recipe
from rlhf_jax.training.state import TrainState
from rlhf_jax.training.stopping import StopRequest
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
    self.evaluations.append(JsonlWriter(self.folder / 'evaluations.jsonl', keep_through=keep))
    self.health.append(JsonlWriter(self.folder / 'health.jsonl', keep_through=keep))
    if self.config.tensorboard:
      board = TensorBoardWriter(self.folder / 'tensorboard', keep_through=keep)
      self.metrics.append(board)
      self.evaluations.append(PrefixedWriter(board, 'evaluation/'))

  def step(self, step: int) -> None:
    """Dispatches one iteration, and settles the one before."""
    batch = self.recipe.batch(step)
    prepared = self.recipe.prepare(self.state, batch)
    self.state, metrics = self.recipe.update(
      dataclasses.replace(self.state, carry=prepared.carry), prepared.batch
    )
    metrics = {**prepared.metrics, **metrics}
    self.pending.append(_Pending(step + 1, prepared, metrics))
    if len(self.pending) > 1:  # one step behind, so that the host never waits for the device
      self.settle(self.pending.popleft())

  def settle_all(self) -> None:
    """Waits for the metrics of every step that was dispatched."""
    while self.pending:
      self.settle(self.pending.popleft())
    now = time.monotonic()
    self.seconds += now - self.clock
    self.clock = now

  def settle(self, done: _Pending) -> None:
    """Reads the metrics of a step: skips or stops at what is not finite, counts tokens."""
    values = metrics_lib.values(done.metrics)
    finite = all(np.isfinite(values[name]) for name in ('loss', 'gradient_norm'))
    finite = finite and not values.get('nonfinite_rewards', 0)
    reason = '' if finite else dumps.reason(values, done.prepared)
    if not finite and self.config.health.nonfinite == 'stop':
      self.give_up(done, values, reason)
    events = self.monitors.see_step(done.step, values, reason or 'a gradient norm is a spike')
    self.tell(events)
    for event in events:
      if event.action == 'stop':
        self.give_up(done, values, event.text)
    if values.get('skipped_updates', 0) and self.monitors.skipped_steps == 1:
      dumps.save(self.folder, done.step, done.prepared, values)
    self.tokens += int(values['tokens'])
    metrics = done.metrics
    if not finite:  # the others of its row still have something to say
      metrics = {name: metrics[name] for name in metrics if np.isfinite(values[name])}
    self.window = metrics_lib.merge([self.window, metrics])

  def give_up(self, done: _Pending, values: dict[str, float], reason: str) -> None:
    """Saves what is needed to study the step, and raises."""
    path = dumps.save(self.folder, done.step, done.prepared, values)
    latest = self.checkpoints.latest_step
    good = (
      'there is no checkpoint' if latest is None else f'the last good checkpoint is step {latest}'
    )
    skip = ', among them --config.health.nonfinite=skip in another --workdir'
    skip = '' if self.config.health.nonfinite == 'skip' else skip
    raise NonFiniteError(
      f'{self.folder}: step {done.step}: {reason}. The batch and the metrics of that step are in '
      f'{path} and {path.with_suffix(".json")}; {good}. '
      f'python -m experiments.replay --run={self.folder} makes the step again and says where it '
      f'goes wrong; docs/health.md has remedies{skip}.'
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
    """Writes and shows the metrics merged since the last row."""
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
      temporary = folder / 'unfinished.npz'
      with temporary.open('wb') as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
      temporary.replace(folder / f'{step:08}.npz')
    row = {**scalars, 'tokens': self.tokens, 'seconds': round(self.seconds, 3)}
    for writer in self.evaluations:
      writer.write(step, row)
    self.tell(self.monitors.see_evaluation(step, scalars, arrays))
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
      "action 'stop'). The state of that step is saved. The same command goes on from it in spite "
      'of this, and stops again only if the value comes back and crosses the limit anew; '
      'docs/health.md says what may help instead.'
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
      if run.start == 0:
        checkpoints.require_metric(run.evaluate(0))
      for step in range(run.start, config.steps):
        run.step(step)
        done = step + 1
        last = done == config.steps
        if step == run.start:
          run.settle_all()
          run.progress.compiled(done, run.tokens)
        stopping = stop.due() and not last
        if last or _due(done, config.log_every):
          run.settle_all()
          run.log(done)
        scalars = None
        if last or _due(done, config.evaluate_every):
          run.settle_all()
          scalars = run.evaluate(done)
        if (
          last
          or stopping
          or run.halt is not None
          or _due(done, config.checkpoint_every)
          or (scalars is not None and config.checkpoint_evaluations)
        ):
          run.settle_all()
          run.save(done, scalars)
        if run.halt is not None and not last:
          raise run.halted(run.halt)
        if stopping:
          stop.honoured = True
          return run.outcome(run.state, stopped=True)
    if run.halt is not None:  # at the end there is nothing left to stop
      processes.say(f'warning: {run.folder}: step {run.halt.step}: {run.halt.text}')
    final = run.state if run.final is None else run.final
    return run.outcome(final, stopped=False)
  finally:
    run.close()
