"""A reward model's gain and bias are what its objective says, and survive a reload."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax.common import prng
from rlhf_jax.data import pipeline
from rlhf_jax.models import roles
from rlhf_jax.objectives.reward_model import RewardModelConfig
from rlhf_jax.recipes import parts as parts_lib
from rlhf_jax.recipes.probes import device_batches, prompt_columns, sample_scores
from rlhf_jax.runs import Run
from tests import tiny

pytestmark = pytest.mark.slow

SAMPLES = 28


def trained(kind: str, parents: pathlib.Path, folder: pathlib.Path) -> tuple[Any, Any, Any]:
  """The stage's pieces, the state it ended with, and its run as another stage reads it."""
  config = tiny.make_config(
    'reward_model',
    parents,
    steps=3,
    objective=RewardModelConfig(normalization=kind, normalization_samples=SAMPLES),
  )
  finished = tiny.run_stage(config, folder)
  with tiny.devices(1):
    parts = parts_lib.load_parts(
      config, {'policy': Run(parents / 'sft')}, tiny.feedback_of(config.data.response_length)
    )
    abstract = roles.abstract_reward_model(parts.model, parts.mesh)
  loaded = finished.outcome.run.restore_role('reward_model', abstract)
  jax.tree.map(np.testing.assert_array_equal, loaded, finished.loop.state.params['reward_model'])
  return parts, loaded, finished


def test_scores_of_policy_samples_are_standardised(
  parents: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """Mean 0 and standard deviation 1 over responses of the initial policy, after training."""
  parts, params, _ = trained('policy_samples', parents, tmp_path / 'run')
  key = prng.stream_key(prng.base_key(parts.config.seed), prng.Stream.NORMALIZATION)
  with jax.set_mesh(parts.mesh):
    policy = {'policy': parts_lib.init_decoder(parts)}
    score = jax.jit(lambda rows: roles.reward_score(parts.model, params, rows))
    columns = prompt_columns(parts, 'train', SAMPLES)
    same, fresh = (
      sample_scores(parts, score, policy, k, columns, rounds=n)
      for k, n in ((key, 1), (jax.random.fold_in(key, 99), 20))
    )
  assert same.mean() == pytest.approx(0, abs=1e-4) and same.std() == pytest.approx(1, abs=1e-4)
  # And not only over the very samples it was set with.
  assert abs(fresh.mean()) < 0.5 and 0.6 < fresh.std() < 1.6


def test_demonstrations_score_zero_on_average(
  parents: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """The mean over training demonstrations is 0 and the gain stays 1."""
  parts, params, _ = trained('demonstrations', parents, tmp_path / 'run')
  assert float(params['normalizer']['gain']) == 1 and float(params['normalizer']['bias']) != 0
  columns = pipeline.encode_demonstrations(
    parts.feedback.train.demonstrations, parts.tokenizer, parts.config.data
  )
  with jax.set_mesh(parts.mesh):
    score = jax.jit(lambda rows: roles.reward_score(parts.model, params, rows))
    scores = np.concatenate(
      [np.asarray(score(rows))[real] for rows, real in device_batches(parts, columns)]
    )
  assert scores.shape == (SAMPLES,)
  assert scores.mean() == pytest.approx(0, abs=1e-5)


def test_none_leaves_the_scores_alone(parents: pathlib.Path, tmp_path: pathlib.Path) -> None:
  _, params, _ = trained('none', parents, tmp_path / 'run')
  assert float(params['normalizer']['gain']) == 1 and float(params['normalizer']['bias']) == 0
