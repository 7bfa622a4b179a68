"""Finished runs opened again: to sample from, or to be asked their own questions anew."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from rlhf_jax.common.errors import RunError
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.feedback.dataset import Feedback
from rlhf_jax.objectives import RewardModelConfig, objective_of
from rlhf_jax.recipes.offline import offline_questions
from rlhf_jax.recipes.online import online_questions
from rlhf_jax.recipes.parts import (
  Parts,
  abstract_decoder,
  abstract_reward_model,
  check_length,
  load_reward_model,
)
from rlhf_jax.recipes.probes import Question
from rlhf_jax.runs import Run


class Finished(NamedTuple):
  """A finished run's pieces, and the parameters it is known by: 'policy' or 'reward_model'."""

  parts: Parts
  params: dict[str, Any]


def open_run(
  run: Run,
  config: ExperimentConfig,
  feedback: Feedback,
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
  model, tokenizer = run.model, run.tokenizer()
  check_length(model, config)
  for role, parent in parents.items():
    parent.require_result()
    if parent.tokenizer().fingerprint != tokenizer.fingerprint:
      raise RunError(
        f'{parent.folder}: it has another tokenizer than {run.folder}: the same token ids mean '
        f'other texts. A {role.replace("_", " ")} must stem from the same start.'
      )
  if 'policy' in parents and parents['policy'].model != model:
    raise RunError(
      f'{parents["policy"].folder}: it has another decoder than {run.folder}. A reference must '
      'have the same.'
    )
  parts = Parts(config, mesh, feedback, tokenizer, model, parents)
  scores = isinstance(config.objective, RewardModelConfig)
  role = 'reward_model' if scores else 'policy'
  abstract = abstract_reward_model(model, mesh) if scores else abstract_decoder(model, mesh)
  return Finished(parts, {role: run.restore_role(role, abstract, checkpoint)})


def own_questions(parts: Parts) -> list[Question]:
  """What the run's evaluations asked along its way."""
  online = objective_of(parts.config.objective).data == 'prompts'
  return online_questions(parts, load_reward_model(parts)) if online else offline_questions(parts)
