"""Checkpoints: asynchronous, atomic, verified, the latest few and the best. The only orbax user."""

import contextlib
import dataclasses
import json
import logging
import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import jax

from rlhf_jax.common import processes, trees
from rlhf_jax.common.errors import ConfigError, RunError
from rlhf_jax.training import seals
from rlhf_jax.training.checksums import checksums
from rlhf_jax.training.state import TrainState

_PARAMS, _REST = 'params_', 'rest'


@dataclasses.dataclass(kw_only=True)
class CheckpointConfig:
  """When checkpoints are written and which are kept. The last step is always written and kept."""

  # Steps between checkpoints; 0 writes only the last step (and on a request to stop).
  every: int = 100
  # How many of the latest are kept.
  keep: int = 2
  # Name of an evaluation metric; when set, a checkpoint is written at each evaluation, and the one
  # with the best value is kept beside the latest ones. Another stage can start from it.
  best_metric: str = ''
  # Whether the best value is the largest ('max') or the smallest ('min').
  best_mode: str = 'max'

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if self.every < 0:
      raise ConfigError(f'{path}.every', self.every, 'an integer >= 0')
    if self.keep < 1:
      raise ConfigError(f'{path}.keep', self.keep, 'an integer >= 1')
    if self.best_mode not in ('max', 'min'):
      raise ConfigError(f'{path}.best_mode', self.best_mode, "'max' or 'min'")


class DamagedError(RunError):
  """A checkpoint is not what was written."""


# What reading may say that tells nothing of the files: with these gone, it may go well.
_NOT_DAMAGE = ('RESOURCE_EXHAUSTED', 'PERMISSION_DENIED', 'UNAVAILABLE', 'DEADLINE_EXCEEDED')
_DAMAGED = 'this checkpoint is damaged'


class Checkpoints:
  """The checkpoints of one run directory."""

  def __init__(self, folder: pathlib.Path, config: CheckpointConfig):
    """Opens (and creates) the folder."""
    self._config = config
    self._folder = folder
    folder.mkdir(parents=True, exist_ok=True)
    whole, unreadable = processes.on_main(self._unreadable)
    if damaged := {int(step): DamagedError(text) for step, text in unreadable.items()}:
      if not whole:
        self._refuse(damaged)
      self._set_aside(damaged)
    self._checkpointer = self._open()

  def _unreadable(self) -> tuple[int, dict[str, str]]:
    """Steps whose metrics would keep orbax from opening the folder, and what is wrong with them.

    How many others there are comes first.
    """
    found = {}
    steps = [path for path in self._folder.iterdir() if path.name.isdigit()]
    for step in steps:
      path = step / 'metrics' / 'metrics'
      try:
        if path.exists():
          json.loads(path.read_bytes())
      except ValueError as error:
        found[step.name] = f'{path}: {_DAMAGED} ({error}).'
    return len(steps) - len(found), found

  def _open(self) -> Any:
    from orbax.checkpoint import v1 as ocp

    return ocp.training.Checkpointer(
      self._folder.absolute(),
      preservation_policy=_preservation(self._config),
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
      cleanup_tmp_directories=True,
    )

  def require_metric(self, scalars: Iterable[str]) -> None:
    """Raises ConfigError if `scalars`, which a run's evaluations give, lack the best metric."""
    name = self._config.best_metric
    if name and name not in scalars:
      given = ', '.join(sorted(scalars))
      raise ConfigError(
        'checkpoint.best_metric',
        name,
        f'one of what evaluations give: {given or "nothing"}',
        '' if given else 'Set evaluation.prompts or evaluation.records.',
      )

  @property
  def _steps(self) -> list[int]:
    """The steps that were written completely, in order."""
    return [info.step for info in self._checkpointer.checkpoints]

  @property
  def latest_step(self) -> int | None:
    """The last step that was written completely."""
    return max(self._steps, default=None)

  def latest_before(self, step: int) -> int | None:
    """The last one that was written before a step was made, which counts from 1."""
    return max((found for found in self._steps if found < step), default=None)

  @property
  def best_step(self) -> int | None:
    """The step with the best metric; None when none was saved with it."""
    name = self._config.best_metric
    scored = [
      (info.metrics[name], info.step)
      for info in self._checkpointer.checkpoints
      if name and info.metrics and math.isfinite(info.metrics.get(name, math.nan))
    ]
    if not scored:
      return None
    return (max if self._config.best_mode == 'max' else min)(scored)[1]

  def save(
    self,
    step: int,
    state: TrainState,
    progress: dict[str, Any],
    metrics: dict[str, float] | None = None,
  ) -> None:
    """Starts writing a checkpoint; returns when the state has been copied and may be donated.

    Args:
      step: the step, equal to `state.step`.
      state: the state of the run.
      progress: small JSON facts that belong to it (tokens seen, seconds).
      metrics: evaluation metrics at this step, for `best_metric`.

    Raises:
      RunError: this checkpoint, or the one before, could not be written.
    """
    if self.latest_step == step:
      return
    name = self._config.best_metric
    value = metrics.get(name, math.nan) if metrics and name else math.nan
    # What is not finite compares with nothing: it is not the best.
    kept = {name: value} if math.isfinite(value) else None
    if jax.default_backend() == 'cpu':
      # Here host arrays are views of buffers: the next update could not reuse those of the state,
      # or would while they are written. A copy is summed up and written.
      state = jax.tree.map(lambda x: x.copy(), state)
    sums = {part: checksums(leaves) for part, leaves in _by_part(state).items()}
    with self._writing():
      self._checkpointer.save_checkpointables_async(
        step, _by_part(state), metrics=kept, custom_metadata=seals.seal(progress, kept, sums)
      )

  def restore(
    self, abstract: TrainState, before: int | None = None
  ) -> tuple[TrainState, dict[str, Any]]:
    """The newest whole state, in the shapes and shardings of `abstract`, and its progress facts.

    With `before`, of those that were written before that step was made. Damaged checkpoints are set
    aside, which is said, and the one before them is taken. Where the best is kept, what the older
    ones say of themselves is verified too: a worse one must not pass for it.

    Raises:
      RunError: there is no checkpoint, none is whole, or they are of another state.
    """
    damaged: dict[int, DamagedError] = {}
    found: tuple[int, dict[str, Any], dict[str, Any]] | None = None
    for step in reversed(self._steps):
      if before is not None and step >= before:
        continue
      try:
        if found is None:
          found = (step, *self._load(step, _by_part(abstract)))
        elif self._config.best_metric:
          self._noted(step)
      except DamagedError as error:
        damaged[step] = error
    if found is None:
      if not damaged:
        raise RunError(f'{self._folder}: there is no checkpoint to resume from.')
      self._refuse(damaged)
    taken, loaded, progress = found
    if damaged:
      self._checkpointer.close()
      self._set_aside(damaged)
      self._checkpointer = self._open()
      if max(damaged) > taken:
        processes.say(f'{self._folder}: falling back to step {taken}')
      if self._config.best_metric:
        processes.say(f'{self._folder}: the best of those that are left is step {self.best_step}')

    def roles(like: dict[str, Any]) -> dict[str, Any]:
      return {role: trees.unflatten(tree, loaded[_PARAMS + role]) for role, tree in like.items()}

    state = TrainState(
      params=roles(abstract.params),
      targets=roles(abstract.targets),
      **trees.unflatten(_rest(abstract), loaded[_REST]),
    )
    return state, progress

  def restore_role(self, role: str, abstract: Any, step: int) -> Any:
    """One role's parameters or targets alone, in the shapes and shardings of `abstract`.

    Raises RunError where there is no such step or role, or it is damaged or of another model.
    """
    part = _PARAMS + role
    try:
      loaded, _ = self._load(step, {part: trees.flatten(abstract)})
    except DamagedError as error:
      raise DamagedError(
        f'{error} Delete {self._folder.parent} and run its command again, or start from another.'
      ) from error
    return trees.unflatten(abstract, loaded[part])

  def _load(self, step: int, abstract: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parts of a step and its progress facts, held against what was noted when it was written.

    orbax casts dtypes silently, reports wrong shapes misleadingly, and hardly checks values.
    """
    from orbax.checkpoint import v1 as ocp

    where = self._where(step)
    if step not in self._steps:
      raise RunError(f'{self._folder}: there is no checkpoint of step {step}.')
    progress, sums = self._noted(step)
    for part, leaves in abstract.items():
      seals.check_fits(where, part, leaves, sums)
    # Of several processes, only some may meet damage: none may wait for another before all agree.
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    with self._reading(where), ocp.Context(multiprocessing_options=alone):
      loaded = self._checkpointer.load_checkpointables(step, abstract)
    found = {part: checksums(loaded[part]) for part in abstract}
    with self._reading(where):
      seals.check_values(found, sums)
    return loaded, progress

  def _noted(self, step: int) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """What was noted of a step when it was written: progress facts and checksums."""
    with self._reading(self._where(step)):
      metadata = self._checkpointer.checkpointables_metadata(step)
      noted = seals.unseal(metadata.custom_metadata, metadata.metrics)
    return noted

  def _where(self, step: int) -> str:
    return f'{self._folder}/{step}'

  @contextlib.contextmanager
  def _reading(self, where: str) -> Iterator[None]:
    """Raises DamagedError, in every process, for whatever goes wrong inside in one of them.

    RunError for what says nothing of the files, such as a lack of memory.
    """
    reason = None
    # orbax and asyncio print pages about what is said in a line here.
    loggers = [logging.getLogger(name) for name in ('absl', 'asyncio')]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
      logger.setLevel(logging.CRITICAL + 1)
    try:
      yield
    except Exception as error:  # there is no telling what a damaged file makes libraries raise
      said = _innermost(error)
      reason = f'{_DAMAGED} ({said}).'
      if isinstance(error, MemoryError | PermissionError) or any(x in said for x in _NOT_DAMAGE):
        reason = (
          f'it cannot be read ({said}). Mend the cause, and run the same command again; or move it '
          'away, to go on from the one before.'
        )
    finally:
      for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    reason = next((said for said in processes.gather(reason) if said is not None), None)
    if reason is not None:
      _agree_on_operations()
      raise (DamagedError if reason.startswith(_DAMAGED) else RunError)(f'{where}: {reason}')

  def _refuse(self, damaged: dict[int, DamagedError]) -> NoReturn:
    found = ' '.join(str(error) for error in damaged.values())
    raise DamagedError(
      f'{found} There is no other one to go on from: delete {self._folder} and run the same '
      'command again to start from the beginning.'
    )

  def _set_aside(self, damaged: dict[int, DamagedError]) -> None:
    """Moves damaged checkpoints out of the way of those that will be written anew."""
    aside = self._folder.with_name('damaged')

    def move() -> None:
      aside.mkdir(exist_ok=True)
      for step in damaged:
        number = len(list(aside.glob(f'{step}.*')))
        (self._folder / str(step)).rename(aside / f'{step}.{number}')

    processes.on_main(move)
    for error in damaged.values():
      processes.say(f'warning: {error} It was moved to {aside}.')

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Says in one line what went wrong with writing, and what there is to go on from."""
    try:
      yield
    except Exception as error:  # of orbax and tensorstore, for one full disk, several
      steps = [int(path.name) for path in self._folder.iterdir() if path.name.isdigit()]
      last = f'step {max(steps)}' if steps else 'none'
      raise RunError(
        f'{self._folder}: a checkpoint could not be written ({_innermost(error)}). The last whole '
        f'one: {last}. Mend the cause, and run the same command again to go on from there.'
      ) from error

  def wait(self) -> None:
    """Returns when all is written; raises RunError if that fails."""
    with self._writing():
      self._checkpointer.wait()

  def close(self) -> None:
    """Waits for the writing that is under way; raises RunError if it fails."""
    with self._writing():
      self._checkpointer.close()


def _agree_on_operations() -> None:
  """Counts orbax's operations alike again in processes of which only some have met damage.

  Those that save together wait for each other under these numbers.
  """
  from orbax.checkpoint._src.futures.synchronization import OperationIdGenerator  # not public

  most = max(processes.gather(int(OperationIdGenerator.get_current_operation_id())))
  while int(OperationIdGenerator.get_current_operation_id()) < most:
    OperationIdGenerator.next_operation_id()


def _preservation(config: CheckpointConfig) -> Any:
  """Which checkpoints are kept."""
  from orbax.checkpoint import v1 as ocp

  policies = ocp.training.preservation_policies
  latest = policies.LatestN(config.keep)
  if not config.best_metric:
    return latest
  best = policies.BestN(
    get_metric_fn=lambda metrics: metrics[config.best_metric],
    reverse=config.best_mode == 'min',
    n=1,
    keep_checkpoints_without_metrics=False,
  )
  return policies.AnyPreservationPolicy([latest, best])


def _rest(state: TrainState) -> dict[str, Any]:
  return {'step': state.step, 'opt_state': state.opt_state, 'key': state.key, 'carry': state.carry}


def _by_part(state: TrainState) -> dict[str, Any]:
  """Each role's parameters apart, so that another stage can load one; flat, canonically named."""
  params = {_PARAMS + role: trees.flatten(tree) for role, tree in state.by_role.items()}
  return {**params, _REST: trees.flatten(_rest(state))}


def _innermost(error: BaseException) -> str:
  """What an error says first of all, in a line."""
  while (inner := error.__cause__ or error.__context__) is not None:
    error = inner
  text = ' '.join(str(error).partition('[tensorstore_spec')[0].split())
  if len(text) < 30:  # as KeyError has it
    text = f'{type(error).__name__}: {text}'
  return text if len(text) <= 300 else text[:300] + '...'
