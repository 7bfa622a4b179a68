"""The root config of a stage: one dataclass; `objective` selects the objective by its type."""

import dataclasses
import importlib.util
import inspect
import pathlib
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from rlhf_jax.common.errors import ConfigError, UserError
from rlhf_jax.common.prng import check_seed
from rlhf_jax.config_parts import (
  EvaluationConfig,
  InitConfig,
  LogConfig,
  RewardModelInitConfig,
)
from rlhf_jax.config_values import NAME, check_types, is_name
from rlhf_jax.data.config import CONTROL, EMBEDDED, DataConfig
from rlhf_jax.generation.config import GenerationConfig
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.gaussian import GaussianPolicyConfig
from rlhf_jax.objectives import OBJECTIVES, ObjectiveConfig, demands_of, objective_of
from rlhf_jax.objectives.sft import SFTConfig
from rlhf_jax.origins import Init, field_of, is_term
from rlhf_jax.rollout.config import RolloutConfig
from rlhf_jax.sharding.mesh import MeshConfig
from rlhf_jax.training.checkpoints import CheckpointConfig
from rlhf_jax.training.health import HealthConfig
from rlhf_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(kw_only=True)
class ExperimentConfig:
  """One stage: a model, data, an objective, and how long."""

  # Shown in progress lines and reports, and part of the folder names of cached stages.
  name: str
  # Seeds parameters, data order, sampling and minibatch order.
  seed: int = 0
  # Iterations of the loop: one update each, or one rollout with its epochs of minibatches.
  steps: int = 100
  # Rows (demonstrations, comparisons or prompts) an iteration, over all devices; objectives that
  # sample several responses to each prompt have so many times more of those.
  batch_size: int = 64
  # Microbatches a minibatch is split into, to save memory; the gradients are the same. Who scores a
  # step's rows (policy, reference, reward models) reads them in as many parts.
  accumulation: int = 1
  # Whether a GPU may use only kernels that give the same bits each time, as CPUs and TPUs do; some
  # are slower (docs/reproducibility.md).
  deterministic: bool = True
  objective: ObjectiveConfig = dataclasses.field(default_factory=SFTConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  # The decoder, if policy.init names none; a stage that starts from another has that one's decoder.
  # On the embedded control task, a GaussianPolicyConfig.
  model: ModelConfig | GaussianPolicyConfig = dataclasses.field(default_factory=ModelConfig)
  # What of the decoders is trained.
  adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
  # Where the trained policy (or the reward model's trunk) starts; it is also the frozen reference.
  policy: InitConfig = dataclasses.field(default_factory=InitConfig)
  # The reward model: the reward of objectives that sample, and for any policy the proxy reward in
  # evaluations.
  reward_model: RewardModelInitConfig = dataclasses.field(default_factory=RewardModelInitConfig)
  # How responses are sampled, in rollouts and in evaluations alike.
  generation: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)
  # What sampled responses are paid; for objectives that learn from their own samples.
  rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
  log: LogConfig = dataclasses.field(default_factory=LogConfig)
  # What is done about numbers that are not finite, spikes of gradients, and collapsing policies.
  health: HealthConfig = dataclasses.field(default_factory=HealthConfig)

  def validate(self) -> None:
    """Checks every value and combination that can be checked without data or devices.

    Raises:
      ConfigError: names the field, its value, what was expected and what to do.
    """
    check_types(self)
    if not is_name(self.name):
      raise ConfigError('name', self.name, NAME)
    for name in ('steps', 'batch_size', 'accumulation'):
      if getattr(self, name) < 1:
        raise ConfigError(name, getattr(self, name), 'an integer >= 1')
    check_seed('seed', self.seed)
    for field in dataclasses.fields(self):
      value: Any = getattr(self, field.name)
      if hasattr(value, 'validate'):
        value.validate(field.name)
    self._validate_rows()
    self._validate_widths()
    self._validate_model()
    self._validate_adapter()
    self._validate_sources()

  def inits(self) -> dict[str, 'Init']:
    """The stages this one starts from, by role: 'policy', 'reward_model', 'reward_model_1', ..."""
    named = {'policy': self.policy.init, 'reward_model': self.reward_model.init}
    ensemble = enumerate(self.reward_model.ensemble, start=1)
    named |= {f'reward_model_{number}': init for number, init in ensemble}
    if objective_of(self.objective).data == 'prompts':
      own = [reward.init for reward in self.rollout.rewards]
      named |= {f'reward_{number}': init for number, init in enumerate(own)}
    return {
      role: Init(init, 'final' if is_term(role) else getattr(self, field_of(role)).checkpoint)
      for role, init in named.items()
      if init is not None
    }

  def with_inits(self, inits: Mapping[str, str]) -> 'ExperimentConfig':
    """The same stage, starting from other places, by role."""
    members = [name for name in inits if name.startswith('reward_model_')]
    rewards = tuple(
      dataclasses.replace(reward, init=inits.get(f'reward_{number}'))
      for number, reward in enumerate(self.rollout.rewards)
    )
    return dataclasses.replace(
      self,
      rollout=dataclasses.replace(self.rollout, rewards=rewards),
      policy=dataclasses.replace(self.policy, init=inits.get('policy')),
      reward_model=dataclasses.replace(
        self.reward_model,
        init=inits.get('reward_model'),
        ensemble=tuple(inits[name] for name in sorted(members, key=lambda name: (len(name), name))),
      ),
    )

  def _validate_rows(self) -> None:
    demands = demands_of(self.objective)
    for rows, made, minibatches in (
      (demands.samples, 'samples', 1),
      (demands.rows, 'rows', demands.minibatches),
    ):
      if self.batch_size * rows % (minibatches * self.accumulation):
        parts = f'accumulation {self.accumulation}'
        if minibatches > 1:
          parts = f'objective.minibatches {minibatches} x {parts}'
        of_each = f' ({rows} {made} of each)' if rows > 1 else ''
        raise ConfigError(
          'batch_size',
          self.batch_size,
          f'rows{of_each} that are a multiple of {parts}',
          'Every microbatch needs the same number of rows.',
        )
    if demands.compares_rows and self.batch_size == 1:
      raise ConfigError(
        'batch_size', 1, 'at least 2', 'What is estimated from other rows of the batch needs some.'
      )
    if demands.group != 1:
      self._validate_groups(demands.group)

  def _validate_widths(self) -> None:
    """Narrower batches are for given texts; packed ones for single texts."""
    objective, data = objective_of(self.objective), self.data
    given = objective.data != 'prompts' and data.source != CONTROL
    if data.length_buckets > 1 and not given:
      raise ConfigError(
        'data.length_buckets',
        data.length_buckets,
        f'1 for {objective.name} with {data.source!r}',
        'Buckets are for objectives that learn from given texts.',
      )
    if data.length_window > 1 and demands_of(self.objective).compares_rows:
      raise ConfigError(
        'data.length_window',
        data.length_window,
        f'1 for {objective.name}',
        'What is estimated from other rows of a batch needs rows of all lengths.',
      )
    if data.pack and not (given and objective.data == 'demonstrations'):
      raise ConfigError(
        'data.pack',
        True,
        f'False for {objective.name} with {data.source!r}',
        'Demonstrations are packed; data.length_buckets narrows other batches.',
      )

  def _validate_groups(self, group: int) -> None:
    if group == 0 and self.accumulation > 1:
      raise ConfigError(
        'accumulation',
        self.accumulation,
        '1 with objective.group_size=0',
        'Pairs of the whole batch need it in one piece; group_size forms them within parts of it.',
      )
    if self.batch_size % ((group or self.batch_size) * self.accumulation):
      raise ConfigError(
        'batch_size',
        self.batch_size,
        f'a multiple of objective.group_size {group} x accumulation {self.accumulation}',
        'Every microbatch needs whole groups.',
      )

  def _validate_model(self) -> None:
    control = self.data.source == CONTROL
    if control != isinstance(self.model, GaussianPolicyConfig):
      raise ConfigError(
        'model',
        type(self.model).__name__,
        f'a {"GaussianPolicyConfig" if control else "ModelConfig"} with {self.data.source!r}',
        'Control has states and actions in the place of texts.',
      )

    domain: Literal['text', 'control'] = 'control' if control else 'text'
    if domain not in objective_of(self.objective).domains:
      able = [name for name, row in OBJECTIVES.items() if domain in row.domains]
      raise ConfigError(
        'objective',
        type(self.objective).__name__,
        f'another objective with {self.data.source!r}: {", ".join(able)}',
        'The others need texts, or probabilities of actions, where control has densities.'
        if control
        else 'It learns control; its counterpart for texts is ILQL.',
      )
    if control:
      self._validate_control()

  def _validate_control(self) -> None:
    objective, source = objective_of(self.objective), self.data.source
    normalization = demands_of(self.objective).normalization.kind
    if normalization != 'none':
      raise ConfigError(
        'objective.normalization',
        normalization,
        f"'none' with {source!r}",
        'Rewards of control are summed over steps as they are.',
      )
    if self.reward_model.ensemble:
      raise ConfigError(
        'reward_model.ensemble', self.reward_model.ensemble, f'none with {source!r}'
      )
    if self.reward_model.init is not None and not objective.paid:
      raise ConfigError(
        'reward_model.init',
        self.reward_model.init,
        f'None for {objective.name} with {source!r}',
        'It is not paid by one, and policies of control are measured by their cost.',
      )

  def _validate_adapter(self) -> None:
    if self.adapter.method == 'none':
      return
    if self.data.source == CONTROL:
      raise ConfigError('adapter.method', self.adapter.method, f"'none' with {self.data.source!r}")
    if self.policy.init is None:
      raise ConfigError(
        'policy.init',
        None,
        f'a run or a config with adapter.method {self.adapter.method!r}',
        'What is not trained must have been trained before.',
      )
    if self.adapter.dropout and objective_of(self.objective).data == 'prompts':
      raise ConfigError(
        'adapter.dropout',
        self.adapter.dropout,
        f'0 for {objective_of(self.objective).name}',
        'Ratios would compare the policy that sampled with another one.',
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
    if objective.data == 'prompts':
      self._validate_rewards(objective.name)
      self._validate_sampling(objective.name)
    elif self.rollout.engine != 'local':
      raise ConfigError(
        'rollout.engine',
        self.rollout.engine,
        f"'local' for {objective.name}",
        'It does not learn from samples of its own; evaluations are always sampled here.',
      )

  def _validate_rewards(self, name: str) -> None:
    sources = self.rollout.sources()
    terms = [(reward.source, reward.init) for reward in self.rollout.rewards]
    if ('reward_model', None) in terms and self.reward_model.init is None:
      raise ConfigError(
        'reward_model.init',
        None,
        f'a reward model for {name}',
        'Name a run or a config (configs/reward_model.py), or another source of reward: '
        "--config.rollout.rewards[0].source='task' on an embedded task, or a Python function.",
      )
    if 'task' in sources and self.data.source != EMBEDDED:
      raise ConfigError(
        f'rollout.rewards[{sources.index("task")}].source',
        'task',
        f"'reward_model' or a function with {self.data.source!r}",
        'Only embedded tasks have a gold reward.',
      )
    if demands_of(self.objective).value == 'reward_model' and self.reward_model.init is None:
      raise ConfigError(
        'objective.value_model', 'reward_model', "'shared' or 'separate' without a reward model"
      )

  def _validate_sampling(self, name: str) -> None:
    if self.generation.top_k != 0 or self.generation.top_p != 1:
      raise ConfigError(
        'generation',
        f'top_k={self.generation.top_k}, top_p={self.generation.top_p}',
        f'top_k 0 and top_p 1 for {name}',
        'Ratios and KL are those of the unfiltered policy: it must be the one that samples.',
      )
    if self.generation.temperature == 0:
      raise ConfigError(
        'generation.temperature',
        0.0,
        f'a number > 0 for {name}',
        'Greedy rollouts explore nothing.',
      )
    assert isinstance(self.model, ModelConfig), 'nothing samples control'
    dtype = self.model.compute_dtype if self.policy.init is None else self.model.dtype
    self.rollout.check_sampling('rollout', self.generation, dtype)
    fixed_length = not (self.generation.stop_at_eos or self.generation.stop_tokens)
    rollout = self.rollout
    if fixed_length and rollout.missing_stop != 'none' and rollout.score_truncation_token < 0:
      raise ConfigError(
        'rollout.missing_stop',
        rollout.missing_stop,
        "'none' where no response can stop",
        'All would be paid alike. Set --config.generation.stop_at_eos=True, or name stop_tokens or '
        'a rollout.score_truncation_token.',
      )
    if demands_of(self.objective).fixed_length and not fixed_length:
      raise ConfigError(
        'objective.score_placement',
        'last_position',
        'responses of a fixed length',
        'Set --config.generation.stop_at_eos=False (and no stop_tokens), or pay at last_token.',
      )


def load_config(reference: str) -> Any:
  """Runs `get_config` of a config file, given as `path/to/config.py` or `path/to/config.py:arg`.

  Raises:
    UserError: the file is missing, fails, has no `get_config`, or one that takes no such argument.
  """
  path, _, argument = reference.partition(':')
  file = pathlib.Path(path)
  if not file.is_file():
    raise UserError(f'{reference}: there is no config file {path}.')
  spec = importlib.util.spec_from_file_location(file.stem, file)
  assert spec is not None
  loader = spec.loader
  assert loader is not None
  module = importlib.util.module_from_spec(spec)
  _ran(reference, lambda: loader.exec_module(module))
  if not hasattr(module, 'get_config'):
    raise UserError(f'{path}: a config file must define get_config().')
  if not argument:
    return _ran(reference, module.get_config)
  if not inspect.signature(module.get_config).parameters:
    raise UserError(f'{reference}: its get_config takes no argument, here {argument!r}.')
  return _ran(reference, lambda: module.get_config(argument))


def _ran(reference: str, call: Callable[[], Any]) -> Any:
  """What the user's code gives; its own errors are the user's, and say where they arose."""
  try:
    return call()
  except SyntaxError as error:
    raise UserError(f'{error.filename}:{error.lineno}: {error.msg}.') from error
  except Exception as error:
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = '' if isinstance(error, UserError) else f'{place.filename}:{place.lineno}: '
    kind = '' if isinstance(error, UserError) else f'{type(error).__name__}: '
    raise UserError(f'{reference}: {where}{kind}{error}') from error


def check_argument(argument: str | None, known: Iterable[str]) -> None:
  """Raises UserError for what follows the colon after a config file if it is none of `known`."""
  if argument is not None and argument not in known:
    raise UserError(f'argument {argument!r}: expected one of {", ".join(known)}.')
