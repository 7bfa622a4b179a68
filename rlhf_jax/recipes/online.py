"""The recipe of objectives that learn from their own samples: PPO."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.common import prng
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.types import PolicyOutput, Prompts, Sequences
from rlhf_jax.data import pipeline
from rlhf_jax.evaluation.policy import decode_sequences
from rlhf_jax.models import roles
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.objectives import Actors, PPOConfig, ppo
from rlhf_jax.recipes import probes
from rlhf_jax.recipes.parts import (
  FrozenRewardModel,
  Parts,
  abstract_decoder,
  abstract_head,
  init_decoder,
  load_reward_model,
  make_trainer,
)
from rlhf_jax.rollout.rollout import Judges, Sampled, assemble
from rlhf_jax.rollout.shaping import truncate_for_scoring
from rlhf_jax.sharding.mesh import put_batch
from rlhf_jax.training.recipe import Prepared, Recipe
from rlhf_jax.training.state import TrainState

Array = jax.Array


def value_model_of(parts: Parts, reward_model: FrozenRewardModel | None) -> ModelConfig:
  """The decoder that the value head sits on."""
  assert isinstance(parts.config.objective, PPOConfig)
  if parts.config.objective.value_model == 'reward_model':
    assert reward_model is not None
    return reward_model.model
  return parts.model


def abstract_params(parts: Parts, value_model: ModelConfig) -> dict[str, Any]:
  """Trained trees by role: the policy, the value head, and the value trunk if it has its own."""
  assert isinstance(parts.config.objective, PPOConfig)
  trees = {
    'policy': abstract_decoder(parts.model, parts.mesh),
    'value_head': abstract_head(value_model, parts.mesh),
  }
  if parts.config.objective.value_model != 'shared':
    trees['value_trunk'] = abstract_decoder(value_model, parts.mesh)
  return trees


def init_params(parts: Parts, reward_model: FrozenRewardModel | None) -> dict[str, Any]:
  """Starts the policy from its parent, and the value function as the objective says.

  A new value head is zero (Ziegler et al. 2019); one from the reward model starts as its head, with
  the normaliser folded in (Huang et al. 2024, released code): values are in the units of rewards.
  """
  assert isinstance(parts.config.objective, PPOConfig)
  kind = parts.config.objective.value_model
  params = {'policy': init_decoder(parts)}
  if kind == 'reward_model':
    assert reward_model is not None
    # Copies: the reward model itself stays frozen, and trained buffers are donated.
    trunk = jax.tree.map(jnp.copy, reward_model.params['trunk'])
    head, normalizer = reward_model.params['head'], reward_model.params['normalizer']
    head = {
      'kernel': head['kernel'] * normalizer['gain'],
      'bias': head['bias'] * normalizer['gain'] + normalizer['bias'],
    }
    return {**params, 'value_head': head, 'value_trunk': trunk}
  abstract = abstract_head(parts.model, parts.mesh)
  head = jax.tree.map(
    lambda leaf: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding), abstract
  )
  if kind == 'separate':
    return {**params, 'value_head': head, 'value_trunk': init_decoder(parts)}
  return {**params, 'value_head': head}


def make_policy(parts: Parts, value_model: ModelConfig) -> Callable[[Any, Sequences], PolicyOutput]:
  """`(params by role, sequences) -> PolicyOutput` with values."""
  temperature = probes.temperature_of(parts)

  def policy(params: Any, sequences: Sequences) -> PolicyOutput:
    return roles.policy_output(
      parts.model,
      params['policy'],
      sequences,
      temperature=temperature,
      value_head=params['value_head'],
      value_trunk=params.get('value_trunk'),
      value_config=value_model,
    )

  return policy


def make_reward(
  parts: Parts, reward_model: FrozenRewardModel | None
) -> Callable[[Sequences], Array]:
  """Scores of responses as they are scored: the reward model's, or the task's gold reward."""
  assert isinstance(parts.config.objective, PPOConfig)
  if parts.config.objective.reward == 'task':
    task = parts.feedback.task
    if task is None:
      raise ConfigError('objective.reward', 'task', "'reward_model' with this data source")

    def gold(sequences: Sequences) -> Array:
      texts = decode_sequences(jax.device_get(sequences), parts.tokenizer.decode)
      return put_batch(np.asarray(task.gold_reward(*texts), np.float32), parts.mesh)

    return gold
  assert reward_model is not None
  return probes.make_score(reward_model)


def online_questions(parts: Parts, reward_model: FrozenRewardModel | None) -> list[probes.Question]:
  """What the policy answers; nothing when no prompts are asked for."""
  policy = probes.policy_question(parts, reward_model)
  return [policy] if policy else []


def make_judges(parts: Parts, policy: Callable[[Any, Sequences], PolicyOutput]) -> Judges:
  """Policy, reference and logits, all at the one sampling temperature."""
  temperature = probes.temperature_of(parts)

  def reference(params: Any, rows: Sequences) -> PolicyOutput:
    return roles.policy_output(parts.model, params, rows, temperature=temperature)

  def logits(params: Any, rows: Sequences) -> Array:
    return roles.response_logits(parts.model, params, rows, temperature=temperature)

  return Judges(policy, reference, logits)


def make_rollout_sampler(
  parts: Parts,
) -> Callable[[Any, Prompts, Array], tuple[Sampled, Sequences]]:
  """Jitted `(policy params, prompts, key)` -> responses, and the same as they are scored."""
  objective = parts.config.objective
  assert isinstance(objective, PPOConfig)
  sampler = probes.make_sampler(parts)

  @jax.jit
  def sample(params: Any, prompts: Prompts, key: Array) -> tuple[Sampled, Sequences]:
    sequences, samples = sampler(params, prompts, key)
    scored = truncate_for_scoring(sequences, samples.finished, objective)
    return Sampled(sequences, samples.logprobs, scored.stopped), scored.sequences

  return sample


def build_ppo(parts: Parts) -> Recipe:
  """The recipe of PPO: every step is a rollout and its epochs of minibatch updates."""
  config = parts.config
  objective = config.objective
  assert isinstance(objective, PPOConfig)
  reward_model = load_reward_model(parts)
  value_model = value_model_of(parts, reward_model)
  policy = make_policy(parts, value_model)
  columns = probes.prompt_columns(parts, 'train', None)
  batches = pipeline.batches(columns, config.batch_size, config.seed)
  reward = make_reward(parts, reward_model)

  sample = make_rollout_sampler(parts)
  judges = make_judges(parts, policy)

  @jax.jit
  def complete(
    params: Any, frozen: Any, coefficient: Array, sampled: Sampled, scores: Array
  ) -> Any:
    return assemble(objective, judges, params, frozen, coefficient, sampled, scores)

  # A batch that straddles two epochs may hold a prompt twice: its rows draw by their place in the
  # batch (the stream already differs from step to step).
  rows = np.arange(config.batch_size, dtype=np.int32)

  def prepare(state: TrainState, prompts: Any) -> Prepared:
    prompts = put_batch(dataclasses.replace(prompts, index=rows), parts.mesh)
    sampled, scored = sample(state.params['policy'], prompts, state.stream(prng.Stream.SAMPLING))
    rollouts, coefficient, metrics = complete(
      state.params, parts.reference, state.carry['kl_coefficient'], sampled, reward(scored)
    )
    return Prepared(rollouts, {'kl_coefficient': coefficient}, metrics)

  def loss(params: Any, batch: Any) -> Any:
    return ppo.loss(objective, Actors(policy=policy), params, batch)

  trainer = make_trainer(
    parts,
    abstract_params(parts, value_model),
    lambda: init_params(parts, reward_model),
    {'kl_coefficient': objective.kl_coefficient},
    loss,
  )
  questions = online_questions(parts, reward_model)
  return Recipe(
    trainer.abstract,
    trainer.init,
    batches.batch,
    prepare,
    trainer.update,
    lambda params, step: probes.ask(questions, params, step),
    lambda state: state,
    ('score', 'kl', 'entropy', 'length'),
    columns.statistics,
  )
