"""ILQL on the embedded reviews, small: what its tilt is worth in gold reward."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax import reading
from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, LogConfig, load_config
from rlhf_jax.data.config import DataConfig, ReviewsConfig
from rlhf_jax.evaluation.intervals import measured
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.objectives.sft import SFTConfig
from rlhf_jax.recipes.finished import open_run, own_questions
from rlhf_jax.recipes.probes import ask
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh
from rlhf_jax.training.optimizer import OptimizerConfig
from tests import tiny

DATA = DataConfig(
  held_out=256.0,
  response_length=10,
  reviews=ReviewsConfig(demonstrations=3000, ratings=4000, comparisons=1, rankings=1),
)
LOG = LogConfig(every=100, tensorboard=False)
PROMPTS = EvaluationConfig(prompts=256, records=0, batch_size=256)
FAST = OptimizerConfig(learning_rate=1e-2, schedule='linear', warmup_updates=10)


@pytest.mark.slow
def test_the_tilt_is_worth_more_than_imitation_and_than_the_start(tmp_path: pathlib.Path) -> None:
  """Decoding with beta 4 beats beta 0 of the same parameters, and the reference, beyond intervals.

  Imitation of all ratings alone, weighted by nothing, gains nothing to speak of.
  """
  start = ExperimentConfig(
    name='sft',
    objective=SFTConfig(),
    data=DATA,
    model=ModelConfig(width=32, layers=1, heads=2, mlp_width=64),
    steps=150,
    optimizer=FAST,
    evaluation=dataclasses.replace(PROMPTS, prompts=0),
    log=LOG,
  )
  tiny.run_stage(start, tmp_path / 'sft')
  config = load_config('configs/ilql.py')
  config = dataclasses.replace(
    config,
    objective=dataclasses.replace(config.objective, awac_beta=0.0),
    data=DATA,
    steps=300,
    batch_size=64,
    optimizer=FAST,
    policy=InitConfig(init=str(tmp_path / 'sft')),
    reward_model=dataclasses.replace(config.reward_model, init=None),
    evaluation=dataclasses.replace(PROMPTS, prompts=0),
    log=LOG,
  )
  run = tiny.run_stage(config, tmp_path / 'ilql').outcome.run
  mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
  feedback = reading.load_data(DATA, tmp_path)

  def answers(beta: float) -> Any:
    asked = dataclasses.replace(
      run.config,
      objective=dataclasses.replace(config.objective, decode_beta=beta),
      evaluation=PROMPTS,
    )
    opened = open_run(run, asked, feedback, mesh, parents=run.parents())
    with jax.set_mesh(mesh):
      found = ask(own_questions(opened.parts), opened.params, config.steps)
    return measured(found.scalars, found.arrays)

  plain, tilted = answers(0.0), answers(4.0)
  assert tilted['gold_reward'].interval.low > plain['gold_reward'].interval.high
  assert tilted['win_rate'].interval.low > 0.5
  assert np.isclose(plain['gold_reward'].mean, 0.0, atol=0.5)
  assert tilted['kl'].mean > plain['kl'].mean
