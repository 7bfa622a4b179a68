"""Wires a config to a recipe: what the loop runs."""

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax

from rlhf_jax.config import ExperimentConfig
from rlhf_jax.data.segments import ControlFeedback
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.feedback.dataset import Feedback
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.gaussian import GaussianPolicyConfig
from rlhf_jax.objectives import objective_of
from rlhf_jax.recipes.control import build_control, load_control
from rlhf_jax.recipes.offline import build_offline
from rlhf_jax.recipes.online import build_online
from rlhf_jax.recipes.parts import load_parts
from rlhf_jax.runs import Run
from rlhf_jax.training.recipe import Recipe


class Built(NamedTuple):
  """A recipe, and what a run directory records of its making."""

  recipe: Recipe
  mesh: jax.sharding.Mesh
  tokenizer: Tokenizer | None
  model: ModelConfig | GaussianPolicyConfig


def build(
  config: ExperimentConfig,
  parents: Mapping[str, Run],
  feedback: Feedback | ControlFeedback,
  root: pathlib.Path | None = None,
  folder: pathlib.Path | None = None,
) -> Built:
  """Makes a validated config's recipe.

  Args:
    config: the stage's config.
    parents: finished runs by role, 'policy' and 'reward_model'.
    feedback: the stage's records, or its segments of control.
    root: a folder for what other stages can use too; None: nothing is kept.
    folder: the directory of the run that is to train; None: there is none.
  """
  if isinstance(feedback, ControlFeedback):
    control = load_control(config, parents, feedback)
    with jax.set_mesh(control.mesh):
      return Built(build_control(control), control.mesh, None, control.model)
  parts = load_parts(config, parents, feedback, root)
  with jax.set_mesh(parts.mesh):
    online = objective_of(config.objective).data == 'prompts'
    recipe = build_online(parts, folder) if online else build_offline(parts)
  return Built(recipe, parts.mesh, parts.tokenizer, parts.model)
