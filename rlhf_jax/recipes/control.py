"""Offline stages on the embedded control task: a Gaussian policy in the place of a decoder."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from rlhf_jax.common import prng
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.types import PolicyOutput
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.data.lqr import ACTION_SIZE, LQR, STATE_SIZE
from rlhf_jax.data.segments import ControlFeedback, columns_of
from rlhf_jax.models import gaussian
from rlhf_jax.models.gaussian import GaussianPolicyConfig
from rlhf_jax.objectives import Actors, objective_of
from rlhf_jax.recipes.offline import Dataset, Learner, Preparation, make_preparation, offline_recipe
from rlhf_jax.recipes.parts import check_devices, placed, shardings_of
from rlhf_jax.recipes.probes import Question, loss_question, preference_question
from rlhf_jax.recipes.trainer import Trees
from rlhf_jax.runs import Run
from rlhf_jax.training.recipe import Evaluation, Recipe

Array = jax.Array
Mesh = jax.sharding.Mesh

# Simulated evaluations: episodes, and the discount at which they end.
_EPISODES, _NEGLIGIBLE = 256, 1e-6


@dataclasses.dataclass(frozen=True)
class ControlParts:
  """The pieces of a stage of control; attributes as in `Parts`."""

  config: ExperimentConfig
  mesh: Mesh
  feedback: ControlFeedback
  model: GaussianPolicyConfig
  parents: Mapping[str, Run]

  @functools.cached_property
  def reference(self) -> Any | None:
    """The policy's parent's parameters, frozen; None for a stage without a parent."""
    return init_policy(self) if 'policy' in self.parents else None


def load_control(
  config: ExperimentConfig, parents: Mapping[str, Run], feedback: ControlFeedback
) -> ControlParts:
  """Builds the mesh and settles the policy.

  Raises:
    ConfigError: the rows do not divide over the mesh, or the parent has another policy.
  """
  asked: Any = config.model
  model = asked.with_sizes(STATE_SIZE, ACTION_SIZE, 'model')
  if 'policy' in parents and parents['policy'].model != model:
    raise ConfigError(
      'model',
      model,
      f'{parents["policy"].model}, that of the stage it starts from',
      'Set the same there and here.',
    )
  return ControlParts(config, check_devices(config), feedback, model, parents)


def abstract_policy(parts: ControlParts) -> Any:
  """The policy's shapes and shardings."""
  axes = gaussian.logical_axes(parts.model)
  return placed(axes, lambda key: gaussian.init(parts.model, key), parts.mesh)


def init_policy(parts: ControlParts) -> Any:
  """The policy's parameters on the mesh: the parent's, or random from the seed."""
  abstract = abstract_policy(parts)
  if 'policy' in parts.parents:
    return parts.parents['policy'].restore_role('policy', abstract, parts.config.policy.checkpoint)
  key = prng.stream_key(prng.base_key(parts.config.seed), prng.Stream.INIT, 0)
  init = jax.jit(lambda key: gaussian.init(parts.model, key), out_shardings=shardings_of(abstract))
  return init(key)


def make_actors(parts: ControlParts) -> Actors:
  """The policy's log-probs of segments."""

  def policy(params: Any, segments: Any) -> PolicyOutput:
    return gaussian.policy_output(parts.model, params['policy'], segments)

  return Actors(policy=policy)


def build_control(parts: ControlParts) -> Recipe:
  """The recipe of an objective that learns from given segments."""
  config = parts.config
  kind = objective_of(config.objective).data
  columns: Any = columns_of(parts.feedback.require('train', kind), kind, config.data.responses)
  trees = Trees({'policy': abstract_policy(parts)}, lambda: {'policy': init_policy(parts)}, {})
  actors = make_actors(parts)
  learner = Learner(
    actors,
    trees,
    Dataset(columns, None),
    lambda preparation: _questions(parts, actors, preparation),
  )
  return offline_recipe(parts, learner)._replace(headline=('gain_error', 'cost', 'optimal_cost'))


def control_questions(parts: ControlParts) -> list[Question]:
  """What is asked of a stage, apart from its training."""
  actors = make_actors(parts)
  return _questions(parts, actors, make_preparation(parts, actors))


def _questions(parts: ControlParts, actors: Actors, preparation: Preparation) -> list[Question]:
  """Held-out preferences or losses, and what the policy costs."""
  config = parts.config
  objective = objective_of(config.objective)
  questions: list[Question] = [cost_question(parts)]
  if config.evaluation.records:
    pairs = parts.feedback.require('held_out', objective.data)
    count = config.evaluation.records
    columns: Any = columns_of(pairs, objective.data, config.data.responses, count)
    ask_about = loss_question if objective.difference is None else preference_question
    questions.append(ask_about(parts, actors, columns, preparation.__call__))
  return questions


def cost_question(parts: ControlParts) -> Question:
  """What does acting by the policy's mean cost, and how far is its gain from the optimal one?

  A linear policy's cost is exact; another's, which has no gain, is simulated.
  """
  task = parts.feedback.task

  @jax.jit
  def act(params: Any, states: Array) -> Array:
    return gaussian.mean(parts.model, params, states)

  def question(params: Any, step: int) -> Evaluation:
    del step
    policy = params['policy']
    numbers = {'optimal_cost': task.optimal_cost}
    if parts.model.is_linear:
      gain = np.asarray(gaussian.gain(parts.model, policy), np.float64)
      numbers |= {'gain_error': task.gain_error(gain), 'cost': task.cost(gain)}
    else:
      numbers['cost'] = simulated_cost(task, lambda states: np.asarray(act(policy, states)))
    return Evaluation(numbers, {})

  return question


def simulated_cost(task: LQR, act: Callable[[np.ndarray], np.ndarray]) -> float:
  """Mean discounted cost of episodes from random first states, in nats."""
  rng = np.random.default_rng(0)
  states = rng.standard_normal((_EPISODES, STATE_SIZE)) @ np.sqrt(task.initial)
  total, discount = np.zeros(_EPISODES), 1.0
  while discount > _NEGLIGIBLE:
    actions = act(states).astype(np.float64)
    total -= discount * task.reward(states, actions)
    states, discount = task.step(states, actions), discount * task.gamma
  return float(total.mean())
