"""Who scores responses: reward models, alone or as an ensemble, tasks, and Python functions."""

import functools
import hashlib
import pathlib
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.common.errors import ConfigError, UserError
from rlhf_jax.common.masked import masked_sum
from rlhf_jax.common.processes import fetch, gather_rows, shared_rows
from rlhf_jax.common.rows import map_rows
from rlhf_jax.common.types import Sequences
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.evaluation.policy import decode_sequences
from rlhf_jax.models import roles
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.roles import abstract_reward_model
from rlhf_jax.objectives import demands_of, objective_of
from rlhf_jax.origins import field_of, is_term, path_of
from rlhf_jax.recipes.parents import judge_model
from rlhf_jax.recipes.parts import Parts
from rlhf_jax.recipes.sharing import once_a_prompt
from rlhf_jax.rollout.config import RolloutConfig
from rlhf_jax.rollout.rewards import aggregate, combine, counted
from rlhf_jax.rollout.rollout import Scored
from rlhf_jax.runs import Run
from rlhf_jax.sharding.mesh import put_batch

Array = jax.Array
Score = Callable[[Sequences], Scored]
# Has devices begin; what comes back, once it is called, asks who is on the host, and scores.
Ask = Callable[[Sequences], Callable[[], Scored]]
# (prompts, responses) as texts -> one number a response
RewardFunction = Callable[[Sequence[str], Sequence[str]], Any]


class FrozenRewardModel(NamedTuple):
  """A trained reward model, or an ensemble of them.

  Attributes:
    models: the members' decoders.
    params: the members' parameters, on the mesh.
    by_token: whether they are process reward models, which score every token.
    aggregate: how members' scores become one; `rollout.rewards.aggregate`.
    coefficient: its coefficient.
  """

  models: tuple[ModelConfig, ...]
  params: tuple[Any, ...]
  by_token: bool = False
  aggregate: str = 'mean'
  coefficient: float = 0.0


def load_reward_model(parts: Parts) -> FrozenRewardModel | None:
  """The reward model or ensemble the config names, of one kind; None if it names none."""
  runs = {role: run for role, run in parts.parents.items() if field_of(role) == 'reward_model'}
  runs = {role: run for role, run in runs.items() if not is_term(role)}
  if not runs:
    return None
  config = parts.config.reward_model
  members = [load_member(parts, run, config.checkpoint) for run in runs.values()]
  if len({member.by_token for member in members}) > 1:
    raise ConfigError(
      'reward_model.ensemble',
      config.ensemble,
      'members that all score whole responses, or all score tokens',
    )
  return FrozenRewardModel(
    tuple(member.models[0] for member in members),
    tuple(member.params[0] for member in members),
    members[0].by_token,
    config.aggregate,
    config.uncertainty_coefficient,
  )


def load_member(parts: Parts, run: Run, checkpoint: str) -> FrozenRewardModel:
  """One reward model by itself."""
  model = judge_model(parts.model, run.model)
  abstract = abstract_reward_model(model, parts.mesh)
  params = run.restore_role('reward_model', abstract, checkpoint)
  objective = run.config.objective
  if reason := demands_of(objective).unpayable:
    raise ConfigError(
      'reward_model.init', str(run.source), 'a reward model that can pay a policy', reason
    )
  return FrozenRewardModel((model,), (params,), objective_of(objective).by_token)


def check_judges(config: ExperimentConfig, parents: Mapping[str, Run]) -> None:
  """Raises ConfigError for a model that is two members of the ensemble, or two of the rewards.

  Its names may differ: parents are the same where their parameters are.
  """
  inits = config.inits()
  members = [role for role in inits if field_of(role) == 'reward_model' and not is_term(role)]
  terms = [role for role in inits if is_term(role)]
  if len(members) == 1 and any(
    reward.source == 'reward_model' and reward.init is None for reward in config.rollout.rewards
  ):
    terms = [*members, *terms]
  for together in (members, terms):
    known: dict[str, str] = {}
    for role in together:
      init, checkpoint = inits[role]
      first = known.setdefault(parents[role].params_identity(checkpoint), role)
      if first != role:
        raise ConfigError(
          path_of(role),
          init,
          f'another model than {path_of(first)}={inits[first].init!r}',
          'Both names lead to the same parameters. Name one that was trained with another seed.',
        )


class Reading(NamedTuple):
  """How reward models read responses.

  Attributes:
    parts: in how many parts, one after the other.
    copies: how many adjacent ones of a part have the same prompt, which is read once.
  """

  parts: int = 1
  copies: int = 1


PLAINLY = Reading()


def make_score(reward_model: FrozenRewardModel, reading: Reading = PLAINLY) -> Score:
  """Normalised scores; parameters are an argument of what is jitted."""
  models, _, by_token, kind, coefficient = reward_model

  @jax.jit
  def score(params: tuple[Any, ...], sequences: Sequences) -> Scored:
    judge = once_a_prompt(roles.token_reward if by_token else roles.reward_score, reading.copies)
    members = [
      map_rows(functools.partial(judge, model, tree), sequences, reading.parts)
      for model, tree in zip(models, params, strict=True)
    ]
    scores = aggregate(jnp.stack(members), kind, coefficient)
    disagreement = None
    if len(members) > 1:
      stacked = jnp.stack(members)
      if by_token:
        stacked = masked_sum(stacked, sequences.response_mask, axis=-1)
      disagreement = stacked.std(0)
    if not by_token:
      return Scored(scores, disagreement=disagreement)
    scores = jnp.where(sequences.response_mask, scores, 0.0)
    return Scored(scores.sum(-1), scores, disagreement)

  return lambda sequences: score(reward_model.params, sequences)


def reward_names(config: RolloutConfig) -> tuple[str, ...]:
  """What users know the rewards by: where each of them comes from."""
  return tuple(reward.source if reward.init is None else reward.init for reward in config.rewards)


def make_reward(
  parts: Parts,
  reward_model: FrozenRewardModel | None,
  *,
  strict: bool = True,
  reading: Reading = PLAINLY,
) -> Ask:
  """The score that the config's rewards make up, of responses as they are scored.

  Reward models are under way before a function is called. What functions say that is not finite
  raises UserError where `strict`, and else is handed on.
  """
  configs = parts.config.rollout.rewards
  judges: list[Ask] = []
  for number, config in enumerate(configs):
    if config.init is not None:
      own = load_member(parts, parts.parents[f'reward_{number}'], 'final')
      judges.append(_begun(make_score(own, reading)))
    elif config.source == 'reward_model':
      assert reward_model is not None
      judges.append(_begun(make_score(reward_model, reading)))
    elif config.source == 'task':
      task = parts.feedback.task
      if task is None:
        path = f'rollout.rewards[{number}].source'
        raise ConfigError(path, 'task', "'reward_model' or a function with this data source")
      judges.append(make_text_score(parts, task.gold_reward, 'the task', strict=strict))
    else:
      function = load_function(config.source)
      judges.append(make_text_score(parts, function, config.source, strict=strict))

  @jax.jit
  def add(found: list[Scored]) -> Scored:
    scores = [scored.scores for scored in found]
    paid = [
      jnp.where(counts[:, None], config.weight * scored.token_rewards, 0.0)
      for counts, config, scored in zip(counted(scores, configs), configs, found, strict=True)
      if scored.token_rewards is not None
    ]
    disagreements = [scored.disagreement for scored in found if scored.disagreement is not None]
    return Scored(
      combine(scores, configs),
      functools.reduce(jnp.add, paid) if paid else None,
      # There is one ensemble at most.
      disagreements[0] if disagreements else None,
      jnp.stack(scores, axis=1),
    )

  def ask(sequences: Sequences) -> Callable[[], Scored]:
    answers = [judge(sequences) for judge in judges]
    return lambda: add([answer() for answer in answers])

  return ask


def _begun(score: Score) -> Ask:
  """A score that devices compute, without waiting for them."""

  def ask(sequences: Sequences) -> Callable[[], Scored]:
    scored = score(sequences)
    return lambda: scored

  return ask


def make_text_score(
  parts: Parts, function: RewardFunction, name: str, *, strict: bool = True
) -> Ask:
  """Scores by a function of texts, computed on the host.

  What comes back raises UserError if the function does not give one number a response; where
  `strict`, a finite one.
  """

  def score(sequences: Sequences) -> Array:
    # Of several processes each asks for a part of the rows, and all get the same numbers.
    count = len(sequences.response)
    rows = shared_rows(count)
    own = jax.tree.map(lambda x: x[rows], sequences)
    texts = decode_sequences(own, parts.tokenizer.decode)
    given = _call(function, texts, name) if len(rows) else []
    expected = f'{name}: expected a list of {len(texts[1])} numbers, one a response, got'
    try:
      found = np.asarray(given)
    except ValueError as error:  # lists of several lengths
      raise UserError(f'{expected} {given!r:.200}.') from error
    if found.shape != (len(texts[1]),) or found.dtype.kind not in 'fiub':
      raise UserError(f'{expected} an array of shape {found.shape} and type {found.dtype}.')
    with np.errstate(over='ignore'):
      scores = found.astype(np.float32)
    if strict and not np.isfinite(scores).all():
      row = int(np.flatnonzero(~np.isfinite(scores))[0])
      raise UserError(
        f'{name}: {found[row]} for the response {texts[1][row]!r:.200}; expected a finite number.'
      )
    return put_batch(gather_rows(scores, count), parts.mesh)

  def ask(sequences: Sequences) -> Callable[[], Scored]:
    fetched = fetch(sequences)
    return lambda: Scored(score(fetched()))

  return ask


def _call(function: RewardFunction, texts: tuple[list[str], list[str]], name: str) -> Any:
  """What the function says; its own errors are the user's, and say where they arose."""
  try:
    return function(*texts)
  except Exception as error:
    raise UserError(f'{name}: {_where(error)}{type(error).__name__}: {error}.') from error


def _where(error: Exception) -> str:
  """`FILE:LINE: ` of the place in an exception's traceback where it arose."""
  frames = traceback.extract_tb(error.__traceback__)
  return f'{frames[-1].filename}:{frames[-1].lineno}: ' if frames else ''


def load_function(source: str) -> RewardFunction:
  """The function named 'FILE.py:NAME'; raises UserError where there is none or the file fails."""
  path, _, name = source.rpartition(':')
  if not pathlib.Path(path).is_file():
    raise UserError(f'{source}: there is no file {path}.')
  # Known by name while it runs, as dataclasses and pickle expect of a module.
  module = types.ModuleType(f'rlhf_jax_rewards_{pathlib.Path(path).stem}')
  module.__file__ = path
  sys.modules[module.__name__] = module
  try:
    # Not by import: compiled code that is kept could be that of the file before its last change.
    exec(compile(pathlib.Path(path).read_bytes(), path, 'exec'), vars(module))
  except SyntaxError as error:
    raise UserError(f'{path}:{error.lineno}: {error.msg}.') from error
  except Exception as error:
    raise UserError(f'{_where(error)}{type(error).__name__}: {error}.') from error
  function = getattr(module, name, None)
  if not callable(function):
    raise UserError(f'{source}: {path} defines no function {name}.')
  return function


def reward_fingerprints(config: RolloutConfig) -> dict[str, str]:
  """SHA-256 of reward functions' files and of those they are said to read, by name.

  With other content the result would be another one. Raises UserError for what is not there.
  """
  found = {}
  for reward in config.rewards:
    if reward.source in ('reward_model', 'task'):
      continue
    load_function(reward.source)
    for name in (reward.source.rpartition(':')[0], *reward.files):
      path = pathlib.Path(name)
      if not path.is_file():
        raise UserError(f'{reward.source}: there is no file {name}, which its `files` names.')
      found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
  return found
