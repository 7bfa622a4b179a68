"""Offline stages on the embedded control task: a Gaussian policy in the place of a decoder."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from rlhf_jax.common import prng
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.masked import masked_sum
from rlhf_jax.common.types import PolicyOutput, QOutput, StepRatings
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.data.lqr import ACTION_SIZE, LQR, STATE_SIZE
from rlhf_jax.data.segments import ControlFeedback, SegmentColumns, columns_of
from rlhf_jax.models import control, gaussian
from rlhf_jax.models.gaussian import GaussianPolicyConfig
from rlhf_jax.models.mlp import replicated_axes
from rlhf_jax.objectives import Actors, demands_of, objective_of
from rlhf_jax.recipes.offline import Dataset, Learner, Preparation, make_preparation, offline_recipe
from rlhf_jax.recipes.parents import check_role
from rlhf_jax.recipes.parts import check_devices, shardings_of
from rlhf_jax.recipes.probes import Question, loss_question, preference_question
from rlhf_jax.recipes.trainer import Trees
from rlhf_jax.runs import Run
from rlhf_jax.sharding.rules import placed
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
    return init_role(self, 'policy') if 'policy' in self.parents else None


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
  for role, run in parents.items():
    check_role(role, str(run.folder), run.config.objective)
  return ControlParts(config, check_devices(config), feedback, model, parents)


_INITS = {
  'policy': gaussian.init,
  'reward_model': control.init_reward,
  'q_heads': control.init_heads,
}


def abstract_role(parts: ControlParts, role: str, model: GaussianPolicyConfig | None = None) -> Any:
  """Shapes and shardings of what is trained in a role; nothing of it is ever split."""
  config = parts.model if model is None else model
  shapes = jax.eval_shape(lambda key: _INITS[role](config, key), jax.random.key(0))
  return placed(replicated_axes(shapes), lambda key: _INITS[role](config, key), parts.mesh)


def init_role(parts: ControlParts, role: str) -> Any:
  """Parameters of a role on the mesh: the parent's policy, or random from the seed."""
  abstract = abstract_role(parts, role)
  if role == 'policy' and 'policy' in parts.parents:
    return parts.parents['policy'].restore_role('policy', abstract, parts.config.policy.checkpoint)
  number = list(_INITS).index(role)
  key = prng.stream_key(prng.base_key(parts.config.seed), prng.Stream.INIT, number)
  init = jax.jit(lambda key: _INITS[role](parts.model, key), out_shardings=shardings_of(abstract))
  return init(key)


def make_actors(parts: ControlParts) -> Actors:
  """Log-probs, rewards summed over segments (Christiano et al. 2017, eq. 1), and values."""
  model = parts.model

  def policy(params: Any, segments: Any) -> PolicyOutput:
    return gaussian.policy_output(model, params['policy'], segments)

  def reward(params: Any, segments: Any) -> Array:
    rewards = control.step_rewards(model, params['reward_model'], segments)
    return masked_sum(rewards, segments.response_mask, axis=-1)

  def q(params: Any, segments: Any) -> QOutput:
    policy, heads, target = (params[role] for role in ('policy', 'q_heads', 'q_target'))
    return control.q_output(model, policy, heads, target, segments)

  return Actors(policy=policy, reward=reward, q=q)


def make_trees(parts: ControlParts) -> Trees:
  """What the stage trains: a policy, a reward model, or a policy with V and Q."""
  objective = parts.config.objective
  q = demands_of(objective).q
  roles: list[str] = [objective_of(objective).trains]
  roles += [] if q is None else ['q_heads']
  abstract: dict[str, Any] = {role: abstract_role(parts, role) for role in roles}
  trees = Trees(abstract, lambda: {role: init_role(parts, role) for role in roles}, {})
  if q is None:
    return trees

  def targets(params: dict[str, Any]) -> dict[str, Any]:
    return {'q_target': control.target_of(params['q_heads'])}

  def move(slow: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda old, new: old + q.target_rate * (new - old), slow, targets(params))

  return trees._replace(targets=targets, move_targets=move)


def step_rewards(parts: ControlParts, segments: Any) -> np.ndarray:
  """`[N, T]` float32 rewards of given segments: the reward model's, or the task's own."""
  if 'reward_model' not in parts.parents:
    return parts.feedback.task.reward(segments.states, segments.actions).astype(np.float32)
  run = parts.parents['reward_model']
  abstract = abstract_role(parts, 'reward_model', run.model)
  params = run.restore_role('reward_model', abstract, parts.config.reward_model.checkpoint)
  judge = jax.jit(lambda params, rows: control.step_rewards(run.model, params, rows))
  return np.asarray(judge(params, segments))


def encode(parts: ControlParts, split: str, count: int | None = None) -> Any:
  """The (first `count`) rows of the kind the objective eats, their steps rated if it wants that."""
  kind, responses = objective_of(parts.config.objective).data, parts.config.data.responses
  rows = parts.feedback.require(split, kind)
  if kind != 'step_ratings':
    return columns_of(rows, kind, responses, count)
  columns = columns_of(rows, 'demonstrations', 'all', count)
  segments: Any = columns.rows
  followed = segments.response_mask & (
    np.arange(segments.response_mask.shape[-1])
    < (segments.response_mask.sum(-1, keepdims=True) - 1)
  )
  return SegmentColumns(StepRatings(segments, step_rewards(parts, segments), followed))


def build_control(parts: ControlParts) -> Recipe:
  """The recipe of an objective that learns from given segments."""
  actors, columns = make_actors(parts), encode(parts, 'train')
  learner = Learner(
    actors,
    make_trees(parts),
    Dataset(columns, None),
    lambda preparation: _questions(parts, actors, preparation),
  )
  recipe = offline_recipe(parts, learner)
  if objective_of(parts.config.objective).trains == 'reward_model':
    return recipe
  return recipe._replace(headline=('gain_error', 'cost', 'optimal_cost'))


def control_questions(parts: ControlParts) -> list[Question]:
  """What is asked of a stage, apart from its training."""
  actors = make_actors(parts)
  return _questions(parts, actors, make_preparation(parts, actors))


def _questions(parts: ControlParts, actors: Actors, preparation: Preparation) -> list[Question]:
  """Held-out preferences or losses, and what the policy costs."""
  config = parts.config
  objective = objective_of(config.objective)
  questions: list[Question] = [cost_question(parts)] if objective.trains == 'policy' else []
  if config.evaluation.records and demands_of(config.objective).group == 1:
    columns = encode(parts, 'held_out', config.evaluation.records)
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
