"""What a stage takes from those that it starts from, and what stands against it."""

import dataclasses
from collections.abc import Mapping

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.objectives import ObjectiveConfig, demands_of, objective_of
from rlhf_jax.origins import field_of, path_of
from rlhf_jax.runs import Run

# How a decoder is computed, which a stage may ask for whatever its parents had.
_COMPUTED = ('dtype', 'vocab_chunk', 'remat', 'scan_layers')


def check_role(role: str, where: str, objective: ObjectiveConfig) -> None:
  """Raises ConfigError for a stage that trains something else than its role says."""
  trained, wanted = objective_of(objective).trains, field_of(role)
  if trained != wanted:
    raise ConfigError(
      path_of(role),
      where,
      f'what trains a {wanted.replace("_", " ")}',
      f'That trains a {trained.replace("_", " ")}.',
    )


def check_objective(role: str, where: str, objective: ObjectiveConfig) -> None:
  """Raises ConfigError for a stage on text that cannot be what its role says."""
  check_role(role, where, objective)
  if demands_of(objective).q is not None:
    raise ConfigError(
      path_of(role),
      where,
      'the run of a policy that is all in its decoder',
      'What that run learnt is the tilt of its Q heads, which would be lost.',
    )


def check_best(role: str, init: str, checkpoint: str, config: ExperimentConfig) -> None:
  """Raises ConfigError for a best checkpoint of a stage to come that will keep none."""
  if checkpoint == 'best' and not config.checkpoint.best_metric:
    raise ConfigError(
      f'{field_of(role)}.checkpoint',
      checkpoint,
      f"'final' with {init}, which keeps no best checkpoint",
      'Set its checkpoint.best_metric, or name a run that kept one.',
    )


def check_tokenizer(role: str, where: str, own: Tokenizer, tokenizer: Tokenizer) -> None:
  """Raises ConfigError for a parent whose tokenizer is not that of the stage."""
  if own.fingerprint != tokenizer.fingerprint:
    raise ConfigError(
      path_of(role),
      where,
      f"a {field_of(role).replace('_', ' ')} with the policy's tokenizer",
      'Train it from the same start (its policy.init), or on the same data.',
    )


def check_templates(parents: Mapping[str, Run], tokenizer: Tokenizer) -> None:
  """Raises ConfigError for a reward model that learnt from dialogues written otherwise."""
  judges = [(role, run) for role, run in parents.items() if role != 'policy']
  for role, run in judges if tokenizer.template is not None else ():
    if run.tokenizer().template not in (None, tokenizer.template):
      raise ConfigError(
        path_of(role),
        str(run.source),
        "a run with this stage's chat template",
        'Its prompts were written otherwise than those it would judge here. Train it with the same '
        '--config.data.chat_template.',
      )


def inherit(asked: ModelConfig, parent: ModelConfig) -> ModelConfig:
  """The parent's decoder, computed as this stage asks.

  Raises ConfigError for a field of `config.model` that asks for another architecture than the
  parent's: it would be ignored.
  """
  default = ModelConfig()
  for field in dataclasses.fields(ModelConfig):
    value = getattr(asked, field.name)
    if field.name in ('attention', *_COMPUTED):
      continue
    if value not in (getattr(default, field.name), getattr(parent, field.name)):
      raise ConfigError(
        f'model.{field.name}',
        value,
        f'{getattr(parent, field.name)!r}, that of the stage it starts from',
        'Change it there: this stage has that decoder.',
      )
  return computed_as(asked, parent)


def computed_as(asked: ModelConfig, model: ModelConfig) -> ModelConfig:
  """A decoder computed as another is; what is None there stays the decoder's own."""
  values = {name: getattr(asked, name) for name in _COMPUTED}
  changes = {name: value for name, value in values.items() if value is not None}
  # The machine's affair, not the model's.
  return dataclasses.replace(model, attention=asked.attention, **changes)


def judge_model(policy: ModelConfig, own: ModelConfig) -> ModelConfig:
  """A reward model's decoder, computed like the policy beside it, as is a value trunk of it."""
  return dataclasses.replace(computed_as(policy, own), scan_layers=policy.scanned)
