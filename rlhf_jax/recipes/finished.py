"""Finished runs opened again: to sample from, or to be asked their own questions anew."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from rlhf_jax.common.errors import RunError
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.data.segments import ControlFeedback
from rlhf_jax.feedback.dataset import Feedback
from rlhf_jax.hf_folder import HfFolder
from rlhf_jax.models import q_heads
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.gaussian import GaussianPolicyConfig
from rlhf_jax.models.hf_model import differences
from rlhf_jax.models.roles import abstract_reward_model
from rlhf_jax.objectives import demands_of, objective_of
from rlhf_jax.recipes.control import ControlParts, control_questions, make_trees
from rlhf_jax.recipes.offline import offline_questions
from rlhf_jax.recipes.online import online_questions
from rlhf_jax.recipes.parents import check_templates, computed_as
from rlhf_jax.recipes.parts import (
  Parts,
  abstract_decoder,
  abstract_q_heads,
  chat_template,
  check_length,
)
from rlhf_jax.recipes.probes import Question
from rlhf_jax.recipes.rewards import load_reward_model
from rlhf_jax.runs import Run


class Finished(NamedTuple):
  """A finished run's pieces, and the parameters it is known by: a policy's or a reward model's."""

  parts: Parts | ControlParts
  params: dict[str, Any]


def open_run(
  run: Run,
  config: ExperimentConfig,
  feedback: Feedback | ControlFeedback,
  mesh: jax.sharding.Mesh,
  *,
  parents: Mapping[str, Run],
  checkpoint: str = 'final',
) -> Finished:
  """Loads a finished run's tokenizer, decoder and parameters; nothing is trained or made anew.

  Args:
    run: the run.
    config: its config, possibly with other evaluation or generation settings.
    feedback: the records that are asked about.
    mesh: where the parameters go; it need not be the mesh of training.
    parents: the reference ('policy') and the reward model, by role.
    checkpoint: 'final' or 'best'.

  Raises:
    RunError: the run is not finished, has no such checkpoint, or a parent cannot be used with it.
    ConfigError: its decoder cannot hold sequences as long as the config says.
  """
  run.require_result()
  if isinstance(feedback, ControlFeedback):
    control = ControlParts(config, mesh, feedback, run.model, parents)
    trees = make_trees(control)
    roles = trees.abstract | ({} if trees.targets is None else trees.targets(trees.abstract))
    restored = {role: run.restore_role(role, tree, checkpoint) for role, tree in roles.items()}
    return Finished(control, restored)
  if isinstance(run.model, GaussianPolicyConfig):
    raise RunError(f'{run.source}: a policy for control, which neither reads nor writes text.')
  model, tokenizer = run.model, run.tokenizer()
  if isinstance(run, HfFolder):  # no stage of its own says how it is computed
    assert isinstance(config.model, ModelConfig), 'validate() demands it of texts'
    model = computed_as(config.model, model)
  check_length(model, config)
  _check_parents(run, model, parents)
  if isinstance(run, HfFolder) and config.data.chat_template:
    tokenizer = tokenizer.with_template(chat_template(config.data))
    check_templates(parents, tokenizer)
  parts = Parts(config, mesh, feedback, tokenizer, model, parents)
  if objective_of(config.objective).trains == 'reward_model':
    roles = {'reward_model': abstract_reward_model(model, mesh)}
  else:
    roles = {'policy': abstract_decoder(model, mesh)}
  if demands_of(config.objective).q is not None:
    roles['q_heads'] = abstract_q_heads(model, mesh)
    roles['q_target'] = q_heads.target_of(roles['q_heads'])
  params = {role: run.restore_role(role, tree, checkpoint) for role, tree in roles.items()}
  return Finished(parts, params)


def _check_parents(run: Run, model: ModelConfig, parents: Mapping[str, Run]) -> None:
  """Raises RunError for what a run cannot be measured against."""
  for role, parent in parents.items():
    parent.require_result()
    if parent.tokenizer().fingerprint != run.tokenizer().fingerprint:
      raise RunError(
        f'{parent.source}: it has another tokenizer than {run.source}: the same token ids mean '
        f'other texts. A {role.replace("_", " ")} must stem from the same start.'
      )
  if 'policy' in parents and differences(parents['policy'].model, model):
    raise RunError(
      f'{parents["policy"].source}: it has another decoder than {run.source}. A reference must '
      'have the same.'
    )


def own_questions(parts: Parts | ControlParts) -> list[Question]:
  """What the run's evaluations asked along its way."""
  if isinstance(parts, ControlParts):
    return control_questions(parts)
  online = objective_of(parts.config.objective).data == 'prompts'
  return online_questions(parts, load_reward_model(parts)) if online else offline_questions(parts)
