"""A stage as its config alone describes it: models of shapes, without weights and without data."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.types import (
  Pairs,
  Prompts,
  Rankings,
  Ratings,
  Sequences,
  StepRatings,
)
from rlhf_jax.config import ExperimentConfig, load_config
from rlhf_jax.data.config import EMBEDDED, DataConfig
from rlhf_jax.hf_folder import is_source, open_source
from rlhf_jax.models import adapters, decoder
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.roles import abstract_reward_model
from rlhf_jax.objectives import ObjectiveConfig, demands_of, objective_of
from rlhf_jax.origins import field_of, path_of
from rlhf_jax.reading import load_data
from rlhf_jax.recipes.parents import (
  check_best,
  check_objective,
  check_tokenizer,
  inherit,
  judge_model,
)
from rlhf_jax.recipes.parts import (
  Parts,
  check_length,
  check_rows,
  make_tokenizer,
)
from rlhf_jax.runs import Run
from rlhf_jax.sharding.rules import placed

# Responses to a prompt in a batch of rankings: data sets differ, this is the OpenAI summaries'.
_RANKED = 4


class PlannedTokenizer(NamedTuple):
  """What recipes ask of a tokenizer; the ids change nothing about shapes."""

  vocab_size: int
  eos_id: int = 0
  pad_id: int = 0
  stops: tuple[int, ...] = ()


class PlannedRun(NamedTuple):
  """What a parent would be: its decoder, and what it trained."""

  model: ModelConfig
  by_token: bool


@dataclasses.dataclass(frozen=True)
class PlannedParts(Parts):
  """The pieces of a stage whose frozen trees are given: shapes, or tracers of them."""

  given: Any = None

  @functools.cached_property
  def reference(self) -> Any | None:
    """The policy's parent's decoder; None for a stage without a parent."""
    return self.given


class PlannedStage(NamedTuple):
  """A stage's models.

  Attributes:
    config: the stage's config, computed as it can be here.
    mesh: the simulated mesh.
    model: the policy's decoder (or the reward model's).
    reward_models: decoders of all reward models that score, by role.
    attention: the attention that the config asks for; it is compiled as plain attention.
    scan_layers: whether it scans its layers; they are compiled as scanned ones.
    notes: what the plan has otherwise than the config.
  """

  config: ExperimentConfig
  mesh: jax.sharding.Mesh
  model: ModelConfig
  reward_models: dict[str, PlannedRun]
  attention: str
  scan_layers: bool
  notes: list[str]

  def as_trained(self, model: ModelConfig) -> ModelConfig:
    """A decoder of the plan with what is compiled otherwise here."""
    return dataclasses.replace(model, attention=self.attention, scan_layers=self.scan_layers)

  def parts(self, reference: Any) -> PlannedParts:
    """What recipes are made from."""
    return PlannedParts(
      config=self.config,
      mesh=self.mesh,
      feedback=None,  # type: ignore[arg-type]
      tokenizer=PlannedTokenizer(self.model.vocab_size),  # type: ignore[arg-type]
      model=self.model,
      parents={},
      given=reference,
    )

  def frozen(self) -> dict[str, Any]:
    """Shapes and shardings of what is read and never trained, by role."""
    objective = objective_of(self.config.objective)
    online = objective.data == 'prompts'
    in_part = self.config.adapter.method != 'none'
    # Policies are evaluated on prompts along the run: against the reference, by the reward model.
    asked = objective.trains == 'policy' and self.config.evaluation.prompts > 0
    needed = online or asked or in_part or objective.reference(self.config.objective)
    frozen = {}
    if self.config.policy.init is not None and needed:
      frozen['reference'] = self._base(self.model)
    for role, run in self.reward_models.items() if online or asked else ():
      frozen[role] = abstract_reward_model(run.model, self.mesh)
    return frozen

  def value_layers(self) -> Any:
    """The frozen layers of a value trunk that shares them with nothing.

    With 'last_layers' a trunk that starts from the reward model is cut in two, and so are copies of
    its layers; all else that stays frozen is the reward model's, or the reference's.
    """
    started = demands_of(self.config.objective).value == 'reward_model'
    if not started or self.config.adapter.method != 'last_layers':
      return {}
    return self._base(self.reward_models['reward_model'].model)['layers']

  def _base(self, model: ModelConfig) -> Any:
    """What a stage starts from, laid out for training in part where a part of it is trained."""
    adapter = self.config.adapter
    axes = decoder.logical_axes(model)
    if adapter.method == 'last_layers':
      axes['top_layers'] = axes['layers']
    return placed(axes, lambda key: adapters.base_of(adapter, decoder.init(model, key)), self.mesh)


def plan_stage(config: ExperimentConfig, mesh: jax.sharding.Mesh, vocab_size: int) -> PlannedStage:
  """Finds the models of a stage and of its parents.

  Args:
    config: a validated config of texts; its parents may be configs that were never run.
    mesh: of simulated devices.
    vocab_size: ids of the tokenizer where no config says; 0: that of the embedded task.

  Raises:
    ConfigError: a vocabulary is not known, parents do not fit, or rows do not divide.
  """
  if not isinstance(config.model, ModelConfig):
    raise ConfigError('model', type(config.model).__name__, 'a ModelConfig: plans are of texts')
  notes: list[str] = []
  model, origin = _policy_model(config, vocab_size, ())
  attention, scanned = model.attention, model.scanned
  if attention != 'xla':
    notes.append(
      f'Attention {attention!r} is compiled as plain attention here, which holds all scores.'
    )
    model = dataclasses.replace(model, attention='xla')
  if not scanned and model.layers > 2:
    notes.append(
      'Layers are compiled as one scanned block; unrolled ones have the same parameters.'
    )
    model = dataclasses.replace(model, scan_layers=True)
  config = dataclasses.replace(config, model=model)
  check_rows(config, mesh)
  check_length(model, config)
  config.adapter.check(model, 'adapter')
  reward_models = {}
  for role in config.inits():
    if field_of(role) == 'reward_model':
      reward_models[role] = _reward_run(config, role, vocab_size, model, origin)
  return PlannedStage(config, mesh, model, reward_models, attention, scanned, notes)


def abstract_batch(config: ExperimentConfig) -> Any:
  """Shapes of a batch of the kind that the stage's objective eats."""
  kind = objective_of(config.objective).data
  data, rows = config.data, config.batch_size
  if kind == 'prompts':
    return abstract_prompts(data, rows)

  def leaf(dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct((rows, *shape), dtype)

  R = data.response_length
  batches: dict[str, Callable[[], Any]] = {
    'demonstrations': lambda: abstract_sequences(data, rows),
    'comparisons': lambda: Pairs(
      abstract_sequences(data, rows, 2), leaf(jnp.float32), leaf(jnp.float32)
    ),
    'ratings': lambda: Ratings(abstract_sequences(data, rows), leaf(jnp.float32)),
    'rankings': lambda: Rankings(
      abstract_sequences(data, rows, _RANKED), leaf(jnp.int32, _RANKED), leaf(bool, _RANKED)
    ),
    'step_ratings': lambda: StepRatings(
      abstract_sequences(data, rows), leaf(jnp.float32, R), leaf(bool, R)
    ),
  }
  return batches[kind]()


def abstract_sequences(data: DataConfig, *rows: int) -> Sequences:
  """Shapes of prompts with responses: `rows` are those of a batch, and of responses to a prompt."""
  of_prompts = (rows[0], 1)[: len(rows)] if data.share_prompts else rows
  prompt, response = (*of_prompts, data.prompt_length), (*rows, data.response_length)
  (P, P_mask), (R, R_mask) = (
    (jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool))
    for shape in (prompt, response)
  )
  return Sequences(P, P_mask, R, R_mask)


def abstract_prompts(data: DataConfig, rows: int) -> Prompts:
  """Shapes of prompts."""
  shapes = ((rows, data.prompt_length), jnp.int32), ((rows, data.prompt_length), bool)
  return Prompts(*(jax.ShapeDtypeStruct(*each) for each in (*shapes, ((rows,), jnp.int32))))


class _Parent(NamedTuple):
  """What a stage starts from.

  Attributes:
    model: its decoder.
    objective: what it trained.
    origin: whose tokenizer it has; None: one that is made from data.
  """

  model: ModelConfig
  objective: ObjectiveConfig
  origin: Run | None


def _policy_model(
  config: ExperimentConfig, vocab_size: int, chain: tuple[str, ...]
) -> tuple[ModelConfig, Run | None]:
  """The decoder of the policy (or trunk), its own or its parent's; and whose tokenizer it has."""
  assert isinstance(config.model, ModelConfig)
  if config.policy.init is not None:
    parent = _parent(config, 'policy', vocab_size, chain)
    return inherit(config.model, parent.model), parent.origin
  if config.model.vocab_size:
    return config.model, None
  return config.model.with_vocabulary(vocab_size or _vocabulary(config.data)), None


def _parent(
  config: ExperimentConfig, role: str, vocab_size: int, chain: tuple[str, ...] = ()
) -> _Parent:
  """What a stage starts from in a role; raises what training would raise."""
  init, checkpoint = config.inits()[role]
  if is_source(init):
    run = open_source(init)
    run.step(checkpoint)
    objective = run.config.objective
    check_objective(role, init, objective)
    return _Parent(run.model, objective, run)
  found = _config_of(role, init, chain)
  check_objective(role, init, found.objective)
  check_best(role, init, checkpoint, found)
  model, origin = _policy_model(found, vocab_size, (*chain, init))
  return _Parent(model, found.objective, origin)


def _reward_run(
  config: ExperimentConfig, role: str, vocab_size: int, policy: ModelConfig, origin: Run | None
) -> PlannedRun:
  judge, init = _parent(config, role, vocab_size), config.inits()[role].init
  if origin is not None and judge.origin is not None:  # of one tokenizer the tables may differ
    check_tokenizer(role, init, judge.origin.tokenizer(), origin.tokenizer())
  elif judge.model.vocab_size != policy.vocab_size:
    raise ConfigError(
      path_of(role),
      init,
      f'a reward model with the {policy.vocab_size} ids of the policy, not '
      f'{judge.model.vocab_size}',
    )
  return PlannedRun(judge_model(policy, judge.model), objective_of(judge.objective).by_token)


def _config_of(role: str, init: str, chain: tuple[str, ...]) -> ExperimentConfig:
  if not pathlib.Path(init.partition(':')[0]).is_file():
    raise ConfigError(path_of(role), init, 'a run directory, a checkpoint folder or a config file')
  if init in chain:
    raise ConfigError(path_of(role), init, 'a stage that does not start from itself')
  found = load_config(init)
  if not isinstance(found, ExperimentConfig):
    raise ConfigError(path_of(role), init, f'the config of a stage, not {type(found).__name__}')
  try:
    found.validate()
  except ConfigError as error:
    raise ConfigError(
      path_of(role), init, 'a stage that can run on behalf of this one', f'Of that one: {error}'
    ) from error
  return found


def _vocabulary(data: DataConfig) -> int:
  if data.source != EMBEDDED:
    raise ConfigError(
      'model.vocab_size',
      0,
      'the number of token ids: a plan reads no data',
      'Give --vocab_size=N, or set model.vocab_size in the config that has the decoder.',
    )
  feedback: Any = load_data(data, pathlib.Path())
  return make_tokenizer(data, feedback).vocab_size
