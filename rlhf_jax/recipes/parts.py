"""What a stage is made of, loaded and placed: mesh, tokenizer, decoder, frozen trees, shardings."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from rlhf_jax.common import prng
from rlhf_jax.common.errors import ConfigError, DataError
from rlhf_jax.common.types import Ratings
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.data import templates, tokenizers
from rlhf_jax.data.config import TRAINED_TOKENIZERS, DataConfig
from rlhf_jax.data.segments import ControlFeedback
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.feedback.dataset import Feedback
from rlhf_jax.models import adapters, attending, decoder, heads, q_heads, roles
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.objectives import demands_of, objective_of
from rlhf_jax.recipes.parents import (
  check_objective,
  check_templates,
  check_tokenizer,
  inherit,
  judge_model,
)
from rlhf_jax.runs import Run
from rlhf_jax.sharding.mesh import make_mesh, replicated, row_devices
from rlhf_jax.sharding.rules import placed

Array = jax.Array
Mesh = jax.sharding.Mesh


class StageParts(Protocol):
  """What stages of every kind have."""

  @property
  def config(self) -> ExperimentConfig: ...

  @property
  def mesh(self) -> Mesh: ...

  @property
  def reference(self) -> Any | None:
    """The parameters that the trained policy starts from, frozen; None without a parent."""


@dataclasses.dataclass(frozen=True)
class Parts:
  """The pieces every recipe wires together.

  Attributes:
    config: the stage's config.
    mesh: the device mesh.
    feedback: the data's records.
    tokenizer: the one of the stage that the policy comes from, or a new one.
    model: the decoder, with its vocabulary size.
    parents: finished runs by role.
    root: a folder for what other stages can use too; None: nothing is kept.
  """

  config: ExperimentConfig
  mesh: Mesh
  feedback: Feedback
  tokenizer: Tokenizer
  model: ModelConfig
  parents: Mapping[str, Run]
  root: pathlib.Path | None = None

  @functools.cached_property
  def reference(self) -> Any | None:
    """The policy's parent's decoder, frozen, on the mesh; None for a stage without a parent.

    It is loaded apart from the trained copy, whose buffers are donated away; of a decoder that is
    trained in part it is also what stays frozen, at no further cost.
    """
    if 'policy' not in self.parents:
      return None
    return adapters.base_of(self.config.adapter, init_decoder(self))


def load_parts(
  config: ExperimentConfig,
  parents: Mapping[str, Run],
  feedback: Feedback,
  root: pathlib.Path | None = None,
) -> Parts:
  """Builds the mesh, finds the tokenizer and settles the decoder.

  Raises:
    ConfigError: the batch does not divide over the mesh, the parents' tokenizers or chat templates
      differ, the decoder cannot hold the sequences or the vocabulary, or its attention cannot run
      here.
  """
  mesh = check_devices(config)
  assert isinstance(config.model, ModelConfig), 'validate() demands it of texts'
  if 'policy' in parents:
    tokenizer = parents['policy'].tokenizer()
    model = inherit(config.model, parents['policy'].model)
  else:
    tokenizer = make_tokenizer(config.data, feedback)
    model = config.model.with_vocabulary(tokenizer.vocab_size)
  for role, run in parents.items():
    check_objective(role, str(run.source), run.config.objective)
    check_tokenizer(role, str(run.source), run.tokenizer(), tokenizer)
  if config.data.chat_template:
    tokenizer = tokenizer.with_template(chat_template(config.data))
  check_templates(parents, tokenizer)
  check_length(model, config)
  check_tokens(config, model)
  config.adapter.check(model, 'adapter')
  judges = (judge_model(model, run.model) for role, run in parents.items() if role != 'policy')
  for each in (model, config.generation.sampling(model), *judges):
    attending.resolve(each)
  return Parts(config, mesh, feedback, tokenizer, model, parents, root)


def check_tokens(config: ExperimentConfig, model: ModelConfig) -> None:
  """Token ids in a config must be ids of the vocabulary."""
  tokens = {
    'generation.stop_tokens': config.generation.stop_tokens,
    'rollout.score_truncation_token': (config.rollout.score_truncation_token,),
  }
  for field, ids in tokens.items():
    if any(token >= model.vocab_size for token in ids):
      raise ConfigError(field, ids, f'ids below {model.vocab_size}, the size of the vocabulary')


def make_tokenizer(config: DataConfig, feedback: Feedback) -> Tokenizer:
  """Trains the named kind on the training records, or loads the named folder."""
  if config.tokenizer not in TRAINED_TOKENIZERS:
    return tokenizers.load(pathlib.Path(config.tokenizer))
  spoken = feedback.train if feedback.unconverted is None else feedback.unconverted
  words = () if feedback.task is None else feedback.task.vocabulary()
  texts = spoken.texts()
  if config.chat_template:
    # Who speaks must be words of the vocabulary too; the special tokens are so anyway.
    bare = {'bos_token': '', 'eos_token': ''}
    source = chat_template(config)
    texts = spoken.texts(lambda dialogue: templates.render(source, bare, dialogue, ask=True))
  return tokenizers.train(config.tokenizer, itertools.chain(words, texts), config.vocab_size)


def chat_template(config: DataConfig) -> str:
  """The chat template that a config names."""
  return templates.named(config.chat_template, 'data.chat_template')


def check_devices(config: ExperimentConfig) -> Mesh:
  """The mesh a config asks for; raises ConfigError if there is none, or its rows do not fit."""
  mesh = make_mesh(config.mesh)
  check_rows(config, mesh)
  return mesh


def check_rows(config: ExperimentConfig, mesh: Mesh) -> None:
  """Every microbatch must divide over the devices that hold rows."""
  demands = demands_of(config.objective)
  devices = row_devices(mesh)
  updated = config.batch_size * demands.rows // (demands.minibatches * config.accumulation)
  scored = config.batch_size * demands.samples // config.accumulation
  if rows := next((rows for rows in (updated, scored) if rows % devices), 0):
    raise ConfigError(
      'batch_size',
      config.batch_size,
      f'microbatches ({rows} rows here) that divide over the {devices} devices of the data and '
      'fsdp axes',
      'Change batch_size, accumulation or the mesh.',
    )
  if config.evaluation.batch_size % devices:
    raise ConfigError(
      'evaluation.batch_size',
      config.evaluation.batch_size,
      f'a multiple of the {devices} devices of the data and fsdp axes',
    )


def check_records(config: ExperimentConfig, feedback: Feedback | ControlFeedback) -> None:
  """Raises DataError without records to learn from, to the very end of the stage."""
  objective = objective_of(config.objective)
  feedback.require('train', objective.data)
  if objective.unlearnable is not None:
    rated = feedback.train.ratings
    given = rated.score if isinstance(rated, Ratings) else [rating.score for rating in rated]
    scores = np.asarray(given, np.float32)
    if reason := objective.unlearnable(config.objective, scores):
      raise DataError(f'{feedback.source}: {reason}')
  if demands_of(config.objective).normalization.kind == 'demonstrations':
    instead = (
      'They are for the normalization alone, not for what is learnt: '
      "--config.objective.normalization='none' does without them, 'policy_samples' takes prompts."
    )
    feedback.require('train', 'demonstrations', instead)


def check_length(model: ModelConfig, config: ExperimentConfig) -> None:
  """Learned positions end somewhere; the prompt and the response must fit."""
  length = config.data.prompt_length + config.data.response_length
  if model.positions == 'learned' and length > model.max_length:
    raise ConfigError(
      'model.max_length', model.max_length, f'at least prompt_length + response_length = {length}'
    )


def abstract_decoder(model: ModelConfig, mesh: Mesh) -> Any:
  """A decoder's shapes and shardings."""
  return placed(decoder.logical_axes(model), lambda key: decoder.init(model, key), mesh)


def abstract_q_heads(model: ModelConfig, mesh: Mesh) -> Any:
  """Shapes and shardings of the heads of offline Q-learning."""
  return placed(q_heads.q_heads_axes(), lambda key: q_heads.q_heads_init(model, key), mesh)


def abstract_head(model: ModelConfig, mesh: Mesh) -> Any:
  """A scalar head's shapes and shardings."""
  return placed(
    heads.scalar_head_axes(),
    lambda key: heads.scalar_head_init(key, model.width, init='zero'),
    mesh,
  )


def abstract_trained_reward_model(parts: Parts) -> Any:
  """Shapes and shardings of what a stage trains of a reward model."""
  whole = roles.abstract_reward_model(parts.model, parts.mesh)
  return {**whole, 'trunk': adapters.abstract(parts.config.adapter, parts.model, parts.mesh)}


def shardings_of(abstract: Any) -> Any:
  """The shardings of a tree of abstract arrays."""
  return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def init_key(parts: Parts, what: int) -> Array:
  """The key of a tree that is made at the start: 0 the decoder, 1 its heads, 2 on its adapters."""
  return prng.stream_key(prng.base_key(parts.config.seed), prng.Stream.INIT, what)


def init_decoder(parts: Parts) -> Any:
  """A decoder's parameters on the mesh: the policy's parent's, or random from the seed."""
  abstract = abstract_decoder(parts.model, parts.mesh)
  if 'policy' in parts.parents:
    return parts.parents['policy'].restore_role('policy', abstract, parts.config.policy.checkpoint)
  return jax.jit(lambda key: decoder.init(parts.model, key), out_shardings=shardings_of(abstract))(
    init_key(parts, 0)
  )


def trained_policy(parts: Parts) -> Any:
  """What is trained of the policy's decoder (or a reward model's trunk), at the start."""
  if parts.config.adapter.method == 'none':
    return init_decoder(parts)
  return trained_part(parts, parts.model, parts.reference, 0)


def trained_part(parts: Parts, model: ModelConfig, base: Any, number: int) -> Any:
  """What is trained of a decoder, from parameters laid out by `adapters.base_of`; copies.

  `number` tells the adapters of a stage's several decoders apart.
  """
  config = parts.config.adapter
  start = jax.jit(
    functools.partial(adapters.init, config, model),
    out_shardings=shardings_of(adapters.abstract(config, model, parts.mesh)),
  )
  return start(base, init_key(parts, 2 + number))


def frozen_part(parts: Parts, model: ModelConfig, base: Any) -> Any:
  """What is not trained of a decoder: the arrays of `base` themselves."""
  everywhere = replicated(parts.mesh)
  return jax.tree.map(
    lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf, everywhere),
    adapters.frozen_of(parts.config.adapter, model, base),
  )


def init_reward_model(parts: Parts, trunk: Any) -> Any:
  """A new head on a trunk, or on what is trained of it, with the identity as its normaliser."""
  abstract = abstract_trained_reward_model(parts)
  make = jax.jit(
    lambda trunk, key: roles.reward_model_from_trunk(parts.model, trunk, key),
    out_shardings=shardings_of(abstract),
    donate_argnums=0,
  )
  return make(trunk, init_key(parts, 1))


def init_q_heads(parts: Parts) -> Any:
  """New heads of offline Q-learning."""
  abstract = abstract_q_heads(parts.model, parts.mesh)
  init = jax.jit(
    lambda key: q_heads.q_heads_init(parts.model, key), out_shardings=shardings_of(abstract)
  )
  return init(init_key(parts, 1))
