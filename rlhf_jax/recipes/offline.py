"""Recipes of objectives that learn from given responses: SFT, reward models, DPO, CPL."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.common.metrics import Metrics, Sum
from rlhf_jax.common.types import Pairs, Sequences
from rlhf_jax.data import pipeline
from rlhf_jax.models import roles
from rlhf_jax.objectives import Actors, RewardModelConfig, objective_of
from rlhf_jax.objectives.base import flatten_pairs
from rlhf_jax.recipes.normalization import normalized
from rlhf_jax.recipes.parts import (
  Parts,
  abstract_decoder,
  abstract_reward_model,
  init_decoder,
  init_reward_model,
  load_reward_model,
  make_trainer,
)
from rlhf_jax.recipes.probes import (
  Question,
  ask,
  likelihood_question,
  policy_question,
  preference_question,
)
from rlhf_jax.sharding.mesh import put_batch
from rlhf_jax.training.recipe import Prepared, Recipe
from rlhf_jax.training.state import TrainState

Array = jax.Array
Columns = pipeline.Columns


def make_actors(parts: Parts) -> Actors:
  """The apply functions of an offline objective; given responses are scored at temperature 1."""

  def policy(params: Any, sequences: Sequences) -> Any:
    return roles.policy_output(parts.model, params['policy'], sequences, temperature=1.0)

  def reward(params: Any, sequences: Sequences) -> Array:
    return roles.reward_score(parts.model, params['reward_model'], sequences, normalize=False)

  return Actors(policy=policy, reward=reward)


def count_tokens(batch: Any) -> Metrics:
  """Real tokens that an update reads."""
  sequences = batch.sequences if isinstance(batch, Pairs) else batch
  return {'tokens': Sum(sequences.prompt_mask.sum() + sequences.response_mask.sum())}


class Scorer(NamedTuple):
  """The frozen reference and the jitted function that adds its log-probs to pairs."""

  reference: Any
  score: Callable[[Any, Pairs], Pairs]


def make_scorer(parts: Parts) -> Scorer:
  """The stage's reference, scoring pairs."""
  actors = make_actors(parts)

  def score(reference: Any, pairs: Pairs) -> Pairs:
    assert actors.policy is not None
    logprobs = actors.policy({'policy': reference}, flatten_pairs(pairs.sequences)).logprobs
    return dataclasses.replace(
      pairs, reference_logprobs=logprobs.reshape(pairs.sequences.response.shape)
    )

  return Scorer(parts.reference, jax.jit(score))


def cache_reference(parts: Parts, scorer: Scorer, columns: Columns) -> Columns:
  """Scores the whole dataset once: the columns with `reference_logprobs` `[N, 2, R]` attached."""
  rows = []
  for batch, real in pipeline.sequential(columns, parts.config.batch_size):
    scored = scorer.score(scorer.reference, put_batch(batch, parts.mesh))
    rows.append(np.asarray(scored.reference_logprobs)[real])
  return columns.attach(reference_logprobs=np.concatenate(rows))


def reference_adder(scorer: Scorer | None) -> Callable[[Any], Any]:
  """Adds the reference's log-probs to a batch on the mesh; without a scorer it adds nothing."""
  if scorer is None:
    return lambda batch: batch
  return lambda batch: scorer.score(scorer.reference, batch)


def build_offline(parts: Parts) -> Recipe:
  """The recipe of SFT, a reward model, DPO or CPL."""
  config = parts.config
  objective = objective_of(config.objective)
  actors = make_actors(parts)
  columns = encode(parts, 'train')
  scorer = make_scorer(parts) if objective.reference(config.objective) else None
  cached = scorer is not None and getattr(config.objective, 'reference', 'online') == 'cached'
  if scorer is not None and cached:
    columns = cache_reference(parts, scorer, columns)
  batches = pipeline.batches(columns, config.batch_size, config.seed)
  count = jax.jit(count_tokens)

  add_reference = reference_adder(scorer)

  def prepare(state: TrainState, batch: Any) -> Prepared:
    batch = put_batch(batch, parts.mesh)
    batch = batch if cached else add_reference(batch)
    return Prepared(batch, state.carry, count(batch))

  def loss(params: Any, batch: Any) -> Any:
    return objective.loss(config.objective, actors, params, batch)

  abstract: dict[str, Any] = (
    {'reward_model': abstract_reward_model(parts.model, parts.mesh)}
    if isinstance(config.objective, RewardModelConfig)
    else {'policy': abstract_decoder(parts.model, parts.mesh)}
  )
  trainer = make_trainer(parts, abstract, lambda: initial_params(parts), {}, loss)
  questions = questions_of(parts, actors, add_reference)

  def finish(state: TrainState) -> TrainState:
    if 'reward_model' not in state.params:
      return state
    return dataclasses.replace(
      state, params={'reward_model': normalized(parts, state.params['reward_model'])}
    )

  return Recipe(
    trainer.abstract,
    trainer.init,
    batches.batch,
    prepare,
    trainer.update,
    lambda params, step: ask(questions, params, step),
    finish,
    ('loss', 'accuracy') if objective.difference else ('loss', 'entropy'),
    columns.statistics,
  )


def offline_questions(parts: Parts) -> list[Question]:
  """What is asked of a stage, apart from its training."""
  scorer = (
    make_scorer(parts)
    if objective_of(parts.config.objective).reference(parts.config.objective)
    else None
  )
  return questions_of(parts, make_actors(parts), reference_adder(scorer))


def questions_of(
  parts: Parts, actors: Actors, add_reference: Callable[[Any], Any]
) -> list[Question]:
  """Held-out likelihood or preferences, and for a policy what it answers."""
  config = parts.config
  questions: list[Question] = []
  if config.evaluation.records:
    held_out = encode(parts, 'held_out', config.evaluation.records)
    if objective_of(config.objective).difference is None:
      questions.append(likelihood_question(parts, actors, held_out))
    else:
      questions.append(preference_question(parts, actors, held_out, add_reference))
  if not isinstance(config.objective, RewardModelConfig):
    policy = policy_question(parts, load_reward_model(parts))
    questions += [policy] if policy else []
  return questions


def initial_params(parts: Parts) -> dict[str, Any]:
  """What is trained at step 0; a reward model is normalised beforehand where Ziegler et al. do."""
  config = parts.config.objective
  if not isinstance(config, RewardModelConfig):
    return {'policy': init_decoder(parts)}
  params = init_reward_model(parts)
  if config.normalization == 'policy_samples':
    params = normalized(parts, params)
  return {'reward_model': params}


def encode(parts: Parts, split: str, count: int | None = None) -> Columns:
  """The (first `count`) records of the kind the objective eats, as token ids."""
  kind = objective_of(parts.config.objective).data
  records = parts.feedback.require(split, kind)[:count]
  encoder = (
    pipeline.encode_demonstrations if kind == 'demonstrations' else pipeline.encode_comparisons
  )
  return encoder(records, parts.tokenizer, parts.config.data)
