"""The checkpoints of tests/golden/hf, opened by the library, and what torch computed for them."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.models import decoder, roles
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf_load import Checkpoint, load_decoder, load_scorer, open_checkpoint

FOLDER = Path(__file__).resolve().parent.parent / 'golden' / 'hf'


class Golden(NamedTuple):
  """A checkpoint, its parameters, and the arrays of expected.npz."""

  checkpoint: Checkpoint
  params: Any
  expected: dict[str, np.ndarray]

  @property
  def model(self) -> ModelConfig:
    """Its decoder."""
    return self.checkpoint.model


def abstract_decoder(model: ModelConfig) -> Any:
  """The shapes of a decoder's parameters."""
  return jax.eval_shape(lambda: decoder.init(model, jax.random.key(0)))


def abstract_scorer(model: ModelConfig) -> Any:
  """The shapes of a reward model's parameters."""
  return jax.eval_shape(lambda: roles.init_reward_model(model, jax.random.key(0)))


@functools.cache
def load(name: str) -> Golden:
  """One of the checkpoints."""
  checkpoint = open_checkpoint(FOLDER / name)
  if checkpoint.scores:
    params = load_scorer(checkpoint, abstract_scorer(checkpoint.model))
  else:
    params = load_decoder(checkpoint, abstract_decoder(checkpoint.model))
  with np.load(FOLDER / name / 'expected.npz') as file:
    return Golden(checkpoint, params, {key: file[key] for key in file.files})
