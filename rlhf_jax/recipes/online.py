"""The recipe of objectives that learn from their own samples."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.common import prng
from rlhf_jax.common.metrics import Metrics
from rlhf_jax.common.types import PolicyOutput, Sequences
from rlhf_jax.data import pipeline
from rlhf_jax.models import adapters, roles
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.objectives import Actors, demands_of, objective_of
from rlhf_jax.objectives.base import Collected
from rlhf_jax.recipes import probes
from rlhf_jax.recipes.engines import make_engine
from rlhf_jax.recipes.parts import (
  Parts,
  abstract_head,
  frozen_part,
  init_decoder,
  shardings_of,
  trained_part,
  trained_policy,
)
from rlhf_jax.recipes.policies import temperature_of
from rlhf_jax.recipes.rewards import (
  FrozenRewardModel,
  Reading,
  load_reward_model,
  make_reward,
  reward_names,
)
from rlhf_jax.recipes.sharing import once_a_prompt, shared_rows, shared_samples
from rlhf_jax.recipes.trainer import Trainer, Trees, make_trainer
from rlhf_jax.rollout.engine import Generated, RolloutEngine
from rlhf_jax.rollout.rollout import (
  Judged,
  Judges,
  Sampled,
  Scored,
  assemble,
  finite_rewards,
  judge,
)
from rlhf_jax.rollout.shaping import truncate_for_scoring
from rlhf_jax.sharding.mesh import constrain_batch, row_devices, share_of
from rlhf_jax.training.health import USABLE
from rlhf_jax.training.recipe import Prepared, Recipe
from rlhf_jax.training.state import TrainState

Array = jax.Array

# What is said of whoever sampled.
_OF_SAMPLER = ('kl', 'kl_k3', 'entropy')


def value_model_of(parts: Parts, reward_model: FrozenRewardModel | None) -> ModelConfig:
  """The decoder that the value head sits on."""
  if demands_of(parts.config.objective).value == 'reward_model':
    assert reward_model is not None
    return reward_model.models[0]
  return parts.model


def abstract_params(parts: Parts, value_model: ModelConfig) -> dict[str, Any]:
  """Trained trees by role: the policy, the value head, and the value trunk if it has its own."""
  adapter = parts.config.adapter
  trees = {'policy': adapters.abstract(adapter, parts.model, parts.mesh)}
  kind = demands_of(parts.config.objective).value
  if kind is not None:
    trees['value_head'] = abstract_head(value_model, parts.mesh)
  if kind in ('separate', 'reward_model'):
    adapter.check(value_model, 'adapter')
    trees['value_trunk'] = adapters.abstract(adapter, value_model, parts.mesh)
  return trees


def init_params(parts: Parts, reward_model: FrozenRewardModel | None) -> dict[str, Any]:
  """Starts the policy from its parent, and the value function as the objective says.

  A new value head is zero (Ziegler et al. 2019); one from the reward model starts as its head, with
  the normaliser folded in (Huang et al. 2024, released code): values are in the units of rewards.
  Of an ensemble the first member is taken.
  """
  kind = demands_of(parts.config.objective).value
  params = {'policy': trained_policy(parts)}
  if kind is None:
    return params
  if kind == 'reward_model':
    assert reward_model is not None
    # Copies: the reward model itself stays frozen, and trained buffers are donated.
    trunk = trained_part(parts, reward_model.models[0], value_base(parts, reward_model), 1)
    head, normalizer = (reward_model.params[0][name] for name in ('head', 'normalizer'))
    head = {
      'kernel': head['kernel'] * normalizer['gain'],
      'bias': head['bias'] * normalizer['gain'] + normalizer['bias'],
    }
    return {**params, 'value_head': head, 'value_trunk': trunk}
  abstract = abstract_head(parts.model, parts.mesh)
  head = jax.jit(
    lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract),
    out_shardings=shardings_of(abstract),
  )()
  if kind == 'shared':
    return {**params, 'value_head': head}
  base = value_base(parts, reward_model)
  trunk = init_decoder(parts) if base is None else trained_part(parts, parts.model, base, 1)
  return {**params, 'value_head': head, 'value_trunk': trunk}


def value_base(parts: Parts, reward_model: FrozenRewardModel | None) -> Any | None:
  """What a value trunk of its own starts from, as `adapters.base_of` lays it out.

  None where all of it is trained, and it is a copy of the policy: that is loaded anew.
  """
  adapter = parts.config.adapter
  if demands_of(parts.config.objective).value == 'reward_model':
    assert reward_model is not None
    return adapters.base_of(adapter, reward_model.params[0]['trunk'])
  return None if adapter.method == 'none' else parts.reference


def frozen_params(
  parts: Parts, value_model: ModelConfig, reward_model: FrozenRewardModel | None
) -> dict[str, Any]:
  """What is not trained of the roles that are trained in part."""
  frozen = {'policy': frozen_part(parts, parts.model, parts.reference)}
  if demands_of(parts.config.objective).value in ('separate', 'reward_model'):
    base = value_base(parts, reward_model)
    frozen['value_trunk'] = frozen_part(parts, value_model, base)
  return frozen


def make_policy(parts: Parts, value_model: ModelConfig) -> Callable[[Any, Sequences], PolicyOutput]:
  """`(params by role, sequences) -> PolicyOutput`, with values where there is a value head."""
  temperature = temperature_of(parts)

  def policy(params: Any, sequences: Sequences) -> PolicyOutput:
    return roles.policy_output(
      parts.model,
      params['policy'],
      sequences,
      temperature=temperature,
      value_head=params.get('value_head'),
      value_trunk=params.get('value_trunk'),
      value_config=value_model,
    )

  return policy


def online_questions(parts: Parts, reward_model: FrozenRewardModel | None) -> list[probes.Question]:
  """What the policy answers; nothing when no prompts are asked for."""
  policy = probes.policy_question(parts, reward_model)
  return [policy] if policy else []


def make_judges(parts: Parts, policy: Callable[[Any, Sequences], PolicyOutput]) -> Judges:
  """Policy, reference and their exact KL, all at the one sampling temperature."""
  temperature = temperature_of(parts)
  copies = shared_samples(parts.config, row_devices(parts.mesh))

  def reference(params: Any, rows: Sequences) -> PolicyOutput:
    return roles.policy_output(parts.model, params, rows, temperature=temperature)

  def exact_kl(params: Any, reference: Any, rows: Sequences) -> Array:
    return roles.response_kl(parts.model, params, reference, rows, temperature)

  return Judges(*(once_a_prompt(judge, copies) for judge in (policy, reference, exact_kl)))


def make_cut(parts: Parts) -> Callable[[Generated], tuple[Sampled, Sequences]]:
  """Jitted: from what an engine gives to responses, and the same as they are scored."""

  @jax.jit
  def cut(generated: Generated) -> tuple[Sampled, Sequences]:
    sequences, finished, logprobs = generated
    scored = truncate_for_scoring(sequences, finished, parts.config.rollout)
    return Sampled(sequences, logprobs, scored.stopped), scored.sequences

  return cut


def make_reader(
  parts: Parts, policy: Callable[[Any, Sequences], PolicyOutput]
) -> Callable[[Any, Any, Sequences], Judged]:
  """Jitted: what the models say of samples, whose scores they need not wait for.

  Its arguments are params by role, the reference's decoder, and the samples.
  """
  config, judges = parts.config, make_judges(parts, policy)

  @jax.jit
  def read(params: Any, frozen: Any, sequences: Sequences) -> Judged:
    judged = judge(config.rollout, judges, params, frozen, sequences, config.accumulation)
    return jax.tree.map(constrain_batch, judged)

  return read


def make_completion(
  parts: Parts,
) -> Callable[[Any, Sampled, Judged, Scored], tuple[Collected, Metrics]]:
  """Jitted: from the objective's carry and judged and scored samples to what is learnt from."""
  config = parts.config
  collect = objective_of(config.objective).collect
  assert collect is not None
  skips = config.health.nonfinite == 'skip'

  @jax.jit
  def complete(
    carry: Any, sampled: Sampled, judged: Judged, scored: Scored
  ) -> tuple[Collected, Metrics]:
    experience, metrics = assemble(config.rollout, sampled, judged, scored)
    collected = collect(config.objective, experience, carry)
    # A number that is the same in every row would come out whole on every device.
    batch = jax.tree.map(constrain_batch, collected.batch)
    # Not all of the carry is the objective's.
    following = {**carry, **collected.carry}
    if skips:
      # Objectives that pick samples by their scores would have a finite loss all the same; and no
      # running mean may learn of these scores.
      usable = finite_rewards(scored).all()
      following = jax.tree.map(lambda new, old: jnp.where(usable, new, old), following, carry)
      following[USABLE] = usable.astype(jnp.float32)
    return collected._replace(batch=batch, carry=following), metrics

  return complete


def make_rollout(
  parts: Parts,
  policy: Callable[[Any, Sequences], PolicyOutput],
  reward_model: FrozenRewardModel | None,
  trees: Trees,
  engine: RolloutEngine,
) -> Callable[[TrainState, Any], Prepared]:
  """An iteration before its updates: samples, scores, and what the objective makes of them."""
  config = parts.config
  cut = make_cut(parts)
  reading = Reading(config.accumulation, shared_samples(config, row_devices(parts.mesh)))
  ask = make_reward(parts, reward_model, strict=False, reading=reading)
  names = reward_names(config.rollout)
  read, complete = make_reader(parts, policy), make_completion(parts)
  from_reference = demands_of(config.objective).sampler == 'reference'

  # A batch that straddles two epochs may hold a prompt twice: prompts draw by their place in the
  # batch (the stream already differs from step to step).
  places = share_of(config.batch_size, parts.mesh).places

  def prepare(state: TrainState, prompts: Any) -> Prepared:
    prompts = dataclasses.replace(prompts, index=places)
    params = {'policy': parts.reference} if from_reference else trees.whole(state.params)
    engine.sync_weights(params, 0 if from_reference else state.step)
    sampled, scored = cut(engine.generate(prompts, state.stream(prng.Stream.SAMPLING)))
    # All that needs no score is under way before functions are called, which keep the host busy.
    answer = ask(scored)
    judged = read(params, parts.reference, sampled.sequences)
    scores = answer()
    collected, metrics = complete(state.carry, sampled, judged, scores)
    if from_reference:  # the samples' own KL, which is 0, says nothing of the policy
      metrics = {name: metrics[name] for name in metrics if name not in _OF_SAMPLER}
    metrics = {**metrics, **collected.metrics}
    return Prepared(
      collected.batch, collected.carry, metrics, sampled.sequences, scores.terms, names
    )

  return prepare


class Learner(NamedTuple):
  """What is trained, and how.

  Attributes:
    policy: `(params by role, sequences) -> PolicyOutput`, with values where there is a value head.
    trees: what is trained.
    trainer: its state and its update.
  """

  policy: Callable[[Any, Sequences], PolicyOutput]
  trees: Trees
  trainer: Trainer


def make_learner(parts: Parts, reward_model: FrozenRewardModel | None) -> Learner:
  """The trained side of an objective that learns from its own samples; it reads no data."""
  config = parts.config
  row = objective_of(config.objective)
  value_model = value_model_of(parts, reward_model)
  policy = make_policy(parts, value_model)
  updated = once_a_prompt(policy, shared_rows(config, row_devices(parts.mesh)))

  def loss(params: Any, batch: Any) -> Any:
    return row.loss(config.objective, Actors(policy=updated), params, batch)

  carry = row.carry(config.objective)
  if config.health.nonfinite == 'skip':
    carry = {**carry, USABLE: 1.0}
  trees = Trees(
    abstract_params(parts, value_model),
    lambda: init_params(parts, reward_model),
    carry,
    frozen=frozen_params(parts, value_model, reward_model),
  )
  return Learner(policy, trees, make_trainer(parts, trees, loss))


def build_online(parts: Parts, folder: pathlib.Path | None) -> Recipe:
  """The recipe of objectives that eat prompts: every step is a rollout and its updates.

  The folder is the run directory, if there is one.
  """
  config = parts.config
  # The type of a start that a config names is known only now.
  config.rollout.check_sampling('rollout', config.generation, parts.model.compute_dtype)
  engine = make_engine(parts, folder)
  reward_model = load_reward_model(parts)
  policy, trees, trainer = make_learner(parts, reward_model)
  columns = probes.prompt_columns(parts, 'train', None)
  places = share_of(config.batch_size, parts.mesh).places
  batches = pipeline.batches(columns, config.batch_size, config.seed, places=places)
  questions = online_questions(parts, reward_model)

  def logprobs(params: Any, batch: Any) -> Array:
    return policy(trees.whole(params), getattr(batch, 'sequences', batch)).logprobs

  return Recipe(
    trainer.abstract,
    trainer.init,
    batches.batch,
    make_rollout(parts, policy, reward_model, trees, engine),
    trainer.update,
    lambda params, step: probes.ask(questions, trees.whole(params), step),
    lambda state: state,
    ('score', 'kl', 'entropy', 'length'),
    columns.statistics,
    examine=trainer.examine,
    logprobs=jax.jit(logprobs),
    close=engine.close,
  )
