"""The root config of a stage: one dataclass; `objective` selects the objective by its type."""

import dataclasses
import difflib
import importlib.util
import json
import math
import pathlib
import types
import typing
from typing import Any

from rlhf_jax.common.errors import ConfigError, UserError
from rlhf_jax.data.config import DataConfig
from rlhf_jax.generation.config import GenerationConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.objectives import (
  OBJECTIVES,
  ObjectiveConfig,
  PPOConfig,
  SFTConfig,
  objective_of,
)
from rlhf_jax.sharding.mesh import MeshConfig
from rlhf_jax.training.checkpoints import CheckpointConfig
from rlhf_jax.training.optimizer import OptimizerConfig

CHECKPOINTS = ('final', 'best')


@dataclasses.dataclass(kw_only=True)
class InitConfig:
  """Which finished stage a model comes from."""

  # A run directory, or a config file (`configs/sft.py`), whose stage is then run first unless its
  # result is at hand; None: nothing (a policy then starts from random parameters).
  init: str | None = None
  # The stage's 'final' parameters, or those of its 'best' evaluation (needs checkpoint.best_metric
  # there).
  checkpoint: str = 'final'

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if self.checkpoint not in CHECKPOINTS:
      raise ConfigError(f'{path}.checkpoint', self.checkpoint, f'one of {CHECKPOINTS}')


@dataclasses.dataclass(kw_only=True)
class EvaluationConfig:
  """What is asked of the model along the run."""

  # Steps between evaluations; 0: at the start and at the end only.
  every: int = 0
  # Held-out prompts to answer (one sampled response each), and held-out records to score; all if
  # there are fewer. 0 asks nothing of the kind.
  prompts: int = 128
  records: int = 512
  # Rows a forward pass.
  batch_size: int = 64
  # Seed of the sampled responses: equal seeds give equal random numbers, whatever the run's seed.
  seed: int = 0

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    for name in ('every', 'prompts', 'records'):
      if getattr(self, name) < 0:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'an integer >= 0')
    if self.batch_size < 1:
      raise ConfigError(f'{path}.batch_size', self.batch_size, 'an integer >= 1')


@dataclasses.dataclass(kw_only=True)
class LogConfig:
  """What is written along the run."""

  # Steps merged into one row of metrics and one line of progress.
  every: int = 10
  # TensorBoard files beside the JSON lines.
  tensorboard: bool = True

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if self.every < 1:
      raise ConfigError(f'{path}.every', self.every, 'an integer >= 1')


@dataclasses.dataclass(kw_only=True)
class ExperimentConfig:
  """One stage: a model, data, an objective, and how long."""

  # Shown in progress lines and reports, and part of the folder names of cached stages.
  name: str
  # Seeds parameters, data order, sampling and minibatch order.
  seed: int = 0
  # Iterations of the loop: one update each, or one rollout with its epochs of minibatches.
  steps: int = 100
  # Rows (demonstrations, comparisons or prompts) an iteration, over all devices.
  batch_size: int = 64
  # Microbatches a minibatch is split into; the gradients are the same.
  accumulation: int = 1
  objective: ObjectiveConfig = dataclasses.field(default_factory=SFTConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  # The decoder, if policy.init names none; a stage that starts from another has that one's decoder.
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  # Where the trained policy (or the reward model's trunk) starts; it is also the frozen reference.
  policy: InitConfig = dataclasses.field(default_factory=InitConfig)
  # The reward model: PPO's source of reward, and for any policy the proxy reward in evaluations.
  reward_model: InitConfig = dataclasses.field(default_factory=InitConfig)
  # How responses are sampled, in rollouts and in evaluations alike.
  generation: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
  log: LogConfig = dataclasses.field(default_factory=LogConfig)

  def validate(self) -> None:
    """Checks every value and combination that can be checked without data or devices.

    Raises:
      ConfigError: names the field, its value, what was expected and what to do.
    """
    check_types(self)
    if not self.name or not all(c.isalnum() or c in '-_.' for c in self.name):
      raise ConfigError('name', self.name, "letters, digits, '-', '_' and '.'")
    for name in ('steps', 'batch_size', 'accumulation'):
      if getattr(self, name) < 1:
        raise ConfigError(name, getattr(self, name), 'an integer >= 1')
    if self.seed < 0:
      raise ConfigError('seed', self.seed, 'an integer >= 0')
    for field in dataclasses.fields(self):
      value: Any = getattr(self, field.name)
      if hasattr(value, 'validate'):
        value.validate(field.name)
    self._validate_rows()
    self._validate_sources()

  def _validate_rows(self) -> None:
    minibatches = self.objective.minibatches if isinstance(self.objective, PPOConfig) else 1
    if self.batch_size % (minibatches * self.accumulation):
      parts = f'accumulation {self.accumulation}'
      if minibatches > 1:
        parts = f'objective.minibatches {minibatches} x {parts}'
      raise ConfigError(
        'batch_size',
        self.batch_size,
        f'a multiple of {parts}',
        'Every microbatch needs the same number of rows.',
      )

  def _validate_sources(self) -> None:
    objective = objective_of(self.objective)
    if objective.reference(self.objective) and self.policy.init is None:
      raise ConfigError(
        'policy.init',
        None,
        f'a run or a config that {objective.name} starts from',
        'Its frozen reference is the policy it starts from.',
      )
    if isinstance(self.objective, PPOConfig):
      if self.objective.reward == 'reward_model' and self.reward_model.init is None:
        raise ConfigError(
          'reward_model.init',
          None,
          'a reward model for PPO',
          'Name a run or a config (configs/reward_model.py), or on an embedded task set '
          '--config.objective.reward=task.',
        )
      if self.objective.reward == 'task' and not self.data.source.startswith('embedded:'):
        raise ConfigError(
          'objective.reward',
          'task',
          f"'reward_model' with {self.data.source!r}",
          'Only embedded tasks have a gold reward.',
        )
      if self.generation.top_k != 0 or self.generation.top_p != 1:
        raise ConfigError(
          'generation',
          f'top_k={self.generation.top_k}, top_p={self.generation.top_p}',
          'top_k 0 and top_p 1 for PPO',
          'Ratios and KL are those of the unfiltered policy: it must be the one that samples.',
        )
      fixed_length = not (self.generation.stop_at_eos or self.generation.stop_tokens)
      if self.objective.score_placement == 'last_position' and not fixed_length:
        raise ConfigError(
          'objective.score_placement',
          'last_position',
          'responses of a fixed length',
          'Set --config.generation.stop_at_eos=False (and no stop_tokens), or pay at last_token.',
        )
      if self.generation.temperature == 0:
        raise ConfigError(
          'generation.temperature', 0.0, 'a number > 0 for PPO', 'Greedy rollouts explore nothing.'
        )


def check_types(config: Any, path: str = '') -> None:
  """Demands of every field, also of configs within, the type it is annotated with.

  Flags are checked where they are read, but a config file can put anything anywhere. Raises
  ConfigError.
  """
  for name, hint in typing.get_type_hints(type(config)).items():
    value = getattr(config, name)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if not any(_fits(value, option) for option in options):
      kinds = ' or '.join(
        str(option) if typing.get_args(option) else option.__name__ for option in options
      )
      raise ConfigError(f'{path}{name}', value, f'{kinds}, not {type(value).__name__}')
    if dataclasses.is_dataclass(value):
      check_types(value, f'{path}{name}.')


def _fits(value: Any, option: Any) -> bool:
  if typing.get_origin(option) is tuple:
    kind = typing.get_args(option)[0]
    return isinstance(value, tuple) and all(_fits(item, kind) for item in value)
  if option is float:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)
  return isinstance(value, option) and (option is bool or not isinstance(value, bool))


def load_config(reference: str) -> Any:
  """Runs `get_config` of a config file, given as `path/to/config.py` or `path/to/config.py:arg`.

  Raises:
    UserError: the file is missing or has no `get_config`.
  """
  path, _, argument = reference.partition(':')
  file = pathlib.Path(path)
  if not file.is_file():
    raise UserError(f'{reference}: there is no config file {path}.')
  spec = importlib.util.spec_from_file_location(file.stem, file)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except SyntaxError as error:
    raise UserError(f'{path}:{error.lineno}: {error.msg}.') from error
  if not hasattr(module, 'get_config'):
    raise UserError(f'{path}: a config file must define get_config(arg=None).')
  return module.get_config(argument) if argument else module.get_config()


def to_dict(config: Any) -> Any:
  """A config as JSON values; a dataclass in a union carries its objective's name as 'kind'."""
  if dataclasses.is_dataclass(config) and not isinstance(config, type):
    values = {
      field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)
    }
    kinds = [name for name, row in OBJECTIVES.items() if row.config is type(config)]
    return {'kind': kinds[0], **values} if kinds else values
  if isinstance(config, tuple | list):
    return [to_dict(value) for value in config]
  return config


def from_dict(kind: type, values: dict[str, Any]) -> Any:
  """The inverse of `to_dict`. Raises UserError for unknown fields."""
  values = dict(values)
  values.pop('kind', None)
  hints = typing.get_type_hints(kind)
  unknown = sorted(values.keys() - hints.keys())
  if unknown:
    raise UserError(f'{kind.__name__} has no field {unknown[0]!r}: {suggestion(unknown[0], hints)}')
  return kind(**{name: _typed(hints[name], value) for name, value in values.items()})


def _typed(hint: Any, value: Any) -> Any:
  options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
  if isinstance(value, dict):
    named = [row.config for name, row in OBJECTIVES.items() if name == value.get('kind')]
    kinds: list[Any] = [*named, *filter(dataclasses.is_dataclass, options)]
    return from_dict(kinds[0], value)
  if isinstance(value, list):
    return tuple(value)
  return value


def suggestion(name: str, known: Any) -> str:
  """`did you mean ...?`, or the list of what there is."""
  close = difflib.get_close_matches(name, list(known), n=1)
  return f'did you mean {close[0]!r}?' if close else f'there are {", ".join(sorted(known))}.'


def canonical_json(values: Any) -> str:
  """One text for equal values, to compare and to fingerprint."""
  return json.dumps(values, sort_keys=True, indent=1)


def differences(first: Any, second: Any, path: str = '') -> list[str]:
  """Where two `to_dict` values differ, as `field: 1 -> 2` lines."""
  if isinstance(first, dict) and isinstance(second, dict):
    return [
      line
      for name in sorted(first.keys() | second.keys())
      for line in differences(first.get(name), second.get(name), f'{path}.{name}' if path else name)
    ]
  return [] if first == second else [f'{path}: {first!r} -> {second!r}']
