"""Recipes of objectives that learn from given responses."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.common.metrics import Metrics, Sum
from rlhf_jax.common.processes import to_host
from rlhf_jax.common.rows import map_rows
from rlhf_jax.common.types import Sequences
from rlhf_jax.data import pipeline
from rlhf_jax.data.packing import Packer
from rlhf_jax.models import adapters, q_heads, roles
from rlhf_jax.objectives import Actors, demands_of, objective_of
from rlhf_jax.objectives.base import response_logprobs
from rlhf_jax.recipes.baselines import reference_baselines
from rlhf_jax.recipes.normalization import normalizer
from rlhf_jax.recipes.parts import (
  Parts,
  StageParts,
  abstract_q_heads,
  abstract_trained_reward_model,
  frozen_part,
  init_q_heads,
  init_reward_model,
  trained_policy,
)
from rlhf_jax.recipes.probes import (
  Question,
  ask,
  device_batches,
  loss_question,
  policy_question,
  preference_question,
)
from rlhf_jax.recipes.reference_cache import ReferenceCache
from rlhf_jax.recipes.rewards import load_reward_model
from rlhf_jax.recipes.trainer import Trees, make_trainer
from rlhf_jax.sharding.mesh import constrain_batch, put_batch, row_devices, share_of
from rlhf_jax.training.recipe import Prepared, Recipe
from rlhf_jax.training.state import TrainState

Array = jax.Array
Columns = pipeline.Columns


def make_actors(parts: Parts) -> Actors:
  """The apply functions of an offline objective; given responses are scored at temperature 1."""
  model = parts.model

  def policy(params: Any, sequences: Sequences) -> Any:
    return roles.policy_output(model, params['policy'], sequences, temperature=1.0)

  def reward(params: Any, sequences: Sequences) -> Array:
    return roles.reward_score(model, params['reward_model'], sequences, normalize=False)

  def token_reward(params: Any, sequences: Sequences) -> Array:
    return roles.token_reward(model, params['reward_model'], sequences)

  def q(params: Any, sequences: Sequences) -> Any:
    policy, heads, target = (params[role] for role in ('policy', 'q_heads', 'q_target'))
    return q_heads.q_output(model, policy, heads, target, sequences)

  return Actors(policy, reward, token_reward, q)


def count_tokens(batch: Any) -> Metrics:
  """Real tokens of the texts of an update: those of a prompt with each of its responses."""
  sequences = getattr(batch, 'sequences', batch)
  mask = sequences.response_mask
  tokens = mask.sum()
  if isinstance(sequences, Sequences):  # segments of control have no prompt; their steps count
    prompts = sequences.prompt_mask
    tokens += prompts.sum() * (math.prod(mask.shape[:-1]) // math.prod(prompts.shape[:-1]))
  return {'tokens': Sum(tokens)}


class Preparation(NamedTuple):
  """What is done to a batch before its update, without gradients.

  Attributes:
    reference: the frozen reference by role, `{'policy': ...}`; None where none is needed.
    score: jitted `(reference, batch) -> batch` with the reference's log-probs.
    prepare: jitted `(params, reference, batch) -> batch`, the objective's own preparation.
  """

  reference: dict[str, Any] | None
  score: Callable[[Any, Any], Any]
  prepare: Callable[[Any, Any, Any], Any]

  def __call__(self, params: Any, batch: Any) -> Any:
    if self.reference is not None and batch.reference_logprobs is None:
      batch = self.score(self.reference, batch)
    return self.prepare(params, self.reference, batch)


def make_preparation(parts: StageParts, actors: Actors, splits: int = 1) -> Preparation:
  """The stage's preparation of batches, which the reference reads in `splits` parts."""
  config = parts.config
  objective = objective_of(config.objective)

  def score(reference: Any, batch: Any) -> Any:
    def read(sequences: Sequences) -> Array:
      return response_logprobs(actors, reference, sequences)

    logprobs = map_rows(read, batch.sequences, splits)
    return dataclasses.replace(batch, reference_logprobs=logprobs)

  def prepare(params: Any, reference: Any, batch: Any) -> Any:
    assert objective.prepare is not None and actors.policy is not None
    policy = actors.policy

    def in_parts(params: Any, sequences: Sequences) -> Any:
      return map_rows(lambda rows: policy(params, rows), sequences, splits)

    split = actors._replace(policy=in_parts)
    prepared = objective.prepare(config.objective, split, params, reference, batch)
    # A number that is the same in every row would come out whole on every device.
    return jax.tree.map(constrain_batch, prepared)

  needed = objective.reference(config.objective)
  return Preparation(
    {'policy': parts.reference} if needed else None,
    jax.jit(score),
    (lambda params, reference, batch: batch)
    if demands_of(config.objective).prepares == 'nothing'
    else jax.jit(prepare),
  )


def cache_reference(parts: StageParts, preparation: Preparation, columns: Columns) -> Columns:
  """Scores the whole dataset once: the columns with the reference's log-probs attached.

  They are found on disk where an earlier stage of the same root has asked (`reference_cache`).
  """
  cache = None
  if isinstance(parts, Parts) and parts.root is not None:
    cache = ReferenceCache(parts.root, parts, columns)
    found = cache.load()
    if found is not None:
      return columns.attach(reference_logprobs=found)
  rows = []
  for batch, real in device_batches(parts, columns, parts.config.batch_size):
    scored = preparation.score(preparation.reference, batch)
    rows.append(to_host(scored.reference_logprobs)[real])
  # Batches of shorter responses have fewer columns (data.length_buckets).
  width = max(part.shape[-1] for part in rows)
  wide = [np.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, width - part.shape[-1])]) for part in rows]
  logprobs = np.concatenate(wide)
  if cache is not None:
    cache.save(logprobs)
  return columns.attach(reference_logprobs=logprobs)


class Dataset(NamedTuple):
  """Training rows, and with what weights they are drawn; None: each once an epoch."""

  columns: Columns
  weights: np.ndarray | None


def curated(parts: Parts, columns: Columns) -> Dataset:
  """What the objective makes of the dataset's ratings; other data stay as they are."""
  objective = objective_of(parts.config.objective)
  if objective.curate is None:
    return Dataset(columns, None)
  scores, keep, weights = objective.curate(
    parts.config.objective,
    np.asarray(columns.extras['score'], np.float64),
    lambda: reference_baselines(parts, columns),
  )
  columns = columns.attach(score=scores.astype(np.float32)).select(np.flatnonzero(keep))
  columns = columns.count(rows_left_out=int((~keep).sum()))
  return Dataset(columns, None if weights is None else weights[keep])


def make_trees(parts: Parts) -> Trees:
  """What the stage trains: a policy, a reward model, or a policy with Q heads."""
  model, mesh = parts.model, parts.mesh
  # Where all of the decoder is trained, the reference is not even loaded for this.
  in_part = parts.config.adapter.method != 'none'
  frozen = frozen_part(parts, model, parts.reference) if in_part else {}
  if objective_of(parts.config.objective).trains == 'reward_model':
    return Trees(
      {'reward_model': abstract_trained_reward_model(parts)},
      lambda: _new_reward(parts, frozen),
      {},
      frozen={'reward_model': {'trunk': frozen}},
    )
  trees = Trees(
    {'policy': adapters.abstract(parts.config.adapter, model, mesh)},
    lambda: {'policy': trained_policy(parts)},
    {},
    frozen={'policy': frozen},
  )
  q = demands_of(parts.config.objective).q
  if q is None:
    return trees

  def targets(params: dict[str, Any]) -> dict[str, Any]:
    return {'q_target': q_heads.target_of(params['q_heads'])}

  def move(slow: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda old, new: old + q.target_rate * (new - old), slow, targets(params))

  return trees._replace(
    abstract={**trees.abstract, 'q_heads': abstract_q_heads(model, mesh)},
    init=lambda: {**trees.init(), 'q_heads': init_q_heads(parts)},
    targets=targets,
    move_targets=move,
  )


class Learner(NamedTuple):
  """What sets one family of offline stages apart from another.

  Attributes:
    actors: the apply functions of the objective.
    trees: what is trained.
    dataset: the training rows.
    questions: what is asked of the model along the run.
    finish: the last touch to the state.
  """

  actors: Actors
  trees: Trees
  dataset: Dataset
  questions: Callable[[Preparation], list[Question]]
  finish: Callable[[TrainState], TrainState] = lambda state: state


def build_offline(parts: Parts) -> Recipe:
  """The recipe of an objective that learns from given responses."""
  actors, trees = make_actors(parts), make_trees(parts)

  def finish(state: TrainState) -> TrainState:
    if 'reward_model' not in state.params:
      return state
    whole = trees.whole(state.params)['reward_model']
    params = {**state.params['reward_model'], 'normalizer': normalizer(parts, whole)}
    return dataclasses.replace(state, params={'reward_model': params})

  def questions(preparation: Preparation) -> list[Question]:
    return questions_of(parts, actors, preparation)

  dataset = curated(parts, encode(parts, 'train'))
  return offline_recipe(parts, Learner(actors, trees, dataset, questions, finish))


def offline_recipe(parts: StageParts, learner: Learner) -> Recipe:
  """The recipe that any offline stage has."""
  config = parts.config
  objective = objective_of(config.objective)
  columns, weights = learner.dataset
  preparation = make_preparation(parts, learner.actors, config.accumulation)
  if demands_of(config.objective).cached_reference:
    columns = cache_reference(parts, preparation, columns)
  share = share_of(config.batch_size, parts.mesh)
  batches = pipeline.batches(
    columns,
    config.batch_size,
    config.seed,
    weights,
    share.places,
    window=config.data.length_window,
    packer=_packer(parts) if config.data.pack else None,
  )
  count = jax.jit(count_tokens)

  def prepare(state: TrainState, batch: Any) -> Prepared:
    batch = put_batch(batch, parts.mesh, share)
    whole = learner.trees.whole(state.by_role)
    return Prepared(preparation(whole, batch), state.carry, count(batch))

  def loss(params: Any, batch: Any) -> Any:
    return objective.loss(config.objective, learner.actors, params, batch)

  def logprobs(params: Any, batch: Any) -> Array:
    whole = learner.trees.whole(params)
    return response_logprobs(learner.actors, whole, getattr(batch, 'sequences', batch))

  trainer = make_trainer(parts, learner.trees, loss)
  # Evaluations have batches of their own size, which accumulation need not divide.
  questions = learner.questions(make_preparation(parts, learner.actors))
  return Recipe(
    trainer.abstract,
    trainer.init,
    batches.batch,
    prepare,
    trainer.update,
    lambda params, step: ask(questions, learner.trees.whole(params), step),
    learner.finish,
    ('loss', 'accuracy') if objective.difference else ('loss',),
    columns.statistics,
    examine=trainer.examine,
    logprobs=jax.jit(logprobs) if objective.trains == 'policy' else None,
  )


def _packer(parts: StageParts) -> Packer:
  """Packs the rows that a device reads at a time."""
  return Packer(parts.config.accumulation, row_devices(parts.mesh))


def offline_questions(parts: Parts) -> list[Question]:
  """What is asked of a stage, apart from its training."""
  actors = make_actors(parts)
  return questions_of(parts, actors, make_preparation(parts, actors))


def questions_of(parts: Parts, actors: Actors, preparation: Preparation) -> list[Question]:
  """Held-out preferences or losses, and for a policy what it answers."""
  config = parts.config
  objective = objective_of(config.objective)
  questions: list[Question] = []
  if asks_of_records(parts):
    held_out = encode(parts, 'held_out', config.evaluation.records)
    if demands_of(config.objective).compares_rows:
      # Neighbours are compared with each other, and records of one prompt often stand together.
      held_out = held_out.select(np.random.default_rng(0).permutation(len(held_out)))
    ask_about = loss_question if objective.difference is None else preference_question
    questions.append(ask_about(parts, actors, held_out, preparation.__call__))
  if objective.trains == 'policy':
    policy = policy_question(parts, load_reward_model(parts))
    questions += [policy] if policy else []
  return questions


def asks_of_records(parts: Parts) -> bool:
  """Whether held-out records are asked about.

  What is curated from the training set as a whole has no counterpart on them, and what compares
  rows with each other none on single ones.
  """
  config = parts.config
  alone = objective_of(config.objective).curate is None and demands_of(config.objective).group == 1
  return alone and config.evaluation.records > 0


def _new_reward(parts: Parts, frozen: Any) -> dict[str, Any]:
  """A reward model at step 0, normalised beforehand where Ziegler et al. do."""
  params = init_reward_model(parts, trained_policy(parts))
  if demands_of(parts.config.objective).normalization.kind == 'policy_samples':
    whole = adapters.join({'trunk': frozen}, params)
    params = {**params, 'normalizer': normalizer(parts, whole)}
  return {'reward_model': params}


def encode(parts: Parts, split: str, count: int | None = None) -> Columns:
  """The (first `count`) records of the kind the objective eats, as token ids."""
  kind = objective_of(parts.config.objective).data
  records = parts.feedback.require(split, kind)[:count]
  return pipeline.encode(kind, records, parts.tokenizer, parts.config.data)
