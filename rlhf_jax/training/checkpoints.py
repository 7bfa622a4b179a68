"""Checkpoints: asynchronous, atomic, the latest few and the best. The only user of orbax."""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

import jax

from rlhf_jax.common import trees
from rlhf_jax.common.errors import ConfigError, RunError
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


class Checkpoints:
  """The checkpoints of one run directory."""

  def __init__(self, folder: pathlib.Path, config: CheckpointConfig):
    """Opens (and creates) the folder."""
    from orbax.checkpoint import v1 as ocp

    policies = ocp.training.preservation_policies
    self._config = config
    preserve: Any = policies.LatestN(config.keep)
    if config.best_metric:
      best = policies.BestN(
        get_metric_fn=lambda metrics: metrics[config.best_metric],
        reverse=config.best_mode == 'min',
        n=1,
        keep_checkpoints_without_metrics=False,
      )
      preserve = policies.AnyPreservationPolicy([preserve, best])
    folder.mkdir(parents=True, exist_ok=True)
    self._folder = folder
    self._checkpointer = ocp.training.Checkpointer(
      folder.absolute(),
      preservation_policy=preserve,
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
  def latest_step(self) -> int | None:
    """The last step that was written completely."""
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  @property
  def best_step(self) -> int | None:
    """The step with the best metric; None when none was saved with it."""
    name = self._config.best_metric
    scored = [
      (info.metrics[name], info.step)
      for info in self._checkpointer.checkpoints
      if name and info.metrics and name in info.metrics
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
    """
    if self.latest_step == step:
      return
    name = self._config.best_metric
    kept = {name: metrics[name]} if metrics and name and name in metrics else None
    if jax.default_backend() == 'cpu':
      # Here host arrays are views of buffers that the next update may reuse: write from a copy.
      state = jax.tree.map(lambda x: x.copy(), state)
    self._checkpointer.save_checkpointables_async(
      step, _by_part(state), metrics=kept, custom_metadata=progress
    )

  def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The latest state, in the shapes and shardings of `abstract`, and its progress facts."""
    step = self.latest_step
    if step is None:
      raise RunError(f'{self._folder}: there is no checkpoint to resume from.')
    loaded = self._load(step, _by_part(abstract))
    progress = self._checkpointer.checkpointables_metadata(step).custom_metadata

    def roles(like: dict[str, Any]) -> dict[str, Any]:
      return {role: trees.unflatten(tree, loaded[_PARAMS + role]) for role, tree in like.items()}

    state = TrainState(
      params=roles(abstract.params),
      targets=roles(abstract.targets),
      **trees.unflatten(_rest(abstract), loaded[_REST]),
    )
    return state, dict(progress) if isinstance(progress, dict) else {}

  def restore_role(self, role: str, abstract: Any, step: int) -> Any:
    """One role's parameters or targets alone, in the shapes and shardings of `abstract`."""
    part = _PARAMS + role
    return trees.unflatten(abstract, self._load(step, {part: trees.flatten(abstract)})[part])

  def _load(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    """orbax casts dtypes silently and reports wrong shapes misleadingly: compare beforehand."""
    if step not in [info.step for info in self._checkpointer.checkpoints]:
      raise RunError(f'{self._folder}: there is no checkpoint of step {step}.')
    saved = self._checkpointer.checkpointables_metadata(step).metadata
    for part, leaves in abstract.items():
      if part not in saved:
        raise RunError(
          f'{self._folder}/{step}: there are no {part!r} in this checkpoint; it has '
          f'{", ".join(sorted(saved))}.'
        )
      found = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in saved[part].items()}
      wanted = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in leaves.items()}
      for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
          raise RunError(
            f'{self._folder}/{step}: {part} {name!r} is {found.get(name, "absent")} in the '
            f'checkpoint, expected {wanted.get(name, "absent")}: it was written by a run with '
            'another model, objective or optimizer.'
          )
    return self._checkpointer.load_checkpointables(step, abstract)

  def close(self) -> None:
    """Waits for the writing that is under way."""
    self._checkpointer.close()


def _rest(state: TrainState) -> dict[str, Any]:
  return {'step': state.step, 'opt_state': state.opt_state, 'key': state.key, 'carry': state.carry}


def _by_part(state: TrainState) -> dict[str, Any]:
  """Each role's parameters apart, so that another stage can load one; flat, canonically named."""
  params = {_PARAMS + role: trees.flatten(tree) for role, tree in state.by_role.items()}
  return {**params, _REST: trees.flatten(_rest(state))}
