"""Tiny stages of every objective on the embedded task, to test what surrounds the mathematics."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax

from rlhf_jax import stages
from rlhf_jax.config import (
  EvaluationConfig,
  ExperimentConfig,
  InitConfig,
  LogConfig,
  RewardModelInitConfig,
)
from rlhf_jax.data.config import DataConfig, ReviewsConfig
from rlhf_jax.data.sources import load as load_feedback
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.objectives import ObjectiveConfig, objective_of
from rlhf_jax.objectives.alol import ALoLConfig
from rlhf_jax.objectives.best_of_n import BestOfNConfig
from rlhf_jax.objectives.cpl import CPLConfig
from rlhf_jax.objectives.cpl_dense import DenseCPLConfig
from rlhf_jax.objectives.cpl_scored import ScoredCPLConfig
from rlhf_jax.objectives.dpo import DPOConfig
from rlhf_jax.objectives.grpo import GRPOConfig
from rlhf_jax.objectives.ilql import ILQLConfig
from rlhf_jax.objectives.kl_penalty import KLPenaltyConfig
from rlhf_jax.objectives.kto import KTOConfig
from rlhf_jax.objectives.online_dpo import OnlineDPOConfig
from rlhf_jax.objectives.orpo import ORPOConfig
from rlhf_jax.objectives.ppo import PPOConfig
from rlhf_jax.objectives.reinforce import ReinforceConfig
from rlhf_jax.objectives.reinforce_pp import ReinforcePPConfig
from rlhf_jax.objectives.reward_listwise import ListwiseRewardConfig
from rlhf_jax.objectives.reward_model import RewardModelConfig
from rlhf_jax.objectives.reward_process import ProcessRewardConfig
from rlhf_jax.objectives.reward_rating import RatingRewardConfig
from rlhf_jax.objectives.rloo import RLOOConfig
from rlhf_jax.objectives.sft import SFTConfig
from rlhf_jax.objectives.simpo import SimPOConfig
from rlhf_jax.objectives.tilted_bc import TiltedBCConfig
from rlhf_jax.objectives.unlikelihood import UnlikelihoodConfig
from rlhf_jax.objectives.weighted_bc import WeightedBCConfig
from rlhf_jax.recipes import Built, build, parts
from rlhf_jax.runs import Run
from rlhf_jax.sharding.mesh import make_mesh
from rlhf_jax.training.checkpoints import CheckpointConfig
from rlhf_jax.training.loop import Outcome
from rlhf_jax.training.optimizer import OptimizerConfig

# What is trained, by the name of its test case.
OBJECTIVES: dict[str, Callable[[], ObjectiveConfig]] = {
  'sft': SFTConfig,
  'reward_model': functools.partial(
    RewardModelConfig, center_coefficient=0.01, normalization_samples=8
  ),
  'dpo': functools.partial(DPOConfig, beta=0.5, label_smoothing=0.1, nll_coefficient=0.1),
  'cpl': functools.partial(CPLConfig, gamma=0.9, bc_coefficient=0.1),
  'cpl_kl': functools.partial(CPLConfig, alpha=0.5, lam=0.75, use_reference=True),
  'cpl_dense': functools.partial(DenseCPLConfig, use_reference=True),
  'cpl_scored': functools.partial(ScoredCPLConfig, group_size=2),
  'simpo': SimPOConfig,
  'orpo': functools.partial(ORPOConfig, nll_normalization='token', prompt_nll=True),
  'unlikelihood': UnlikelihoodConfig,
  'kto': KTOConfig,
  'alol': functools.partial(ALoLConfig, variant='token'),
  'ilql': functools.partial(ILQLConfig, awac_beta=0.5),
  'weighted_bc': functools.partial(WeightedBCConfig, variant='weighted'),
  'reward_listwise': functools.partial(ListwiseRewardConfig, normalization_samples=8),
  'reward_rating': functools.partial(RatingRewardConfig, normalization='demonstrations'),
  'reward_process': ProcessRewardConfig,
  'rloo': functools.partial(RLOOConfig, samples=2, minibatches=2),
  'reinforce': ReinforceConfig,
  'reinforce_pp': functools.partial(ReinforcePPConfig, samples=2, group_baseline=True, epochs=2),
  'grpo': functools.partial(GRPOConfig, samples=4, epochs=2),
  'online_dpo': functools.partial(OnlineDPOConfig, minibatches=2),
  'best_of_n': functools.partial(BestOfNConfig, samples=4, keep=2),
  'tilted_bc': functools.partial(TiltedBCConfig, samples=4, minibatches=2),
  'ppo': lambda: PPOConfig(epochs=2, minibatches=2, kl=KLPenaltyConfig(target=0.05, horizon=100)),
}
# A tensor axis of 2 divides the heads, and the vocabulary once it is rounded up.
MODEL = ModelConfig(width=16, layers=1, heads=2, mlp_width=32, vocab_multiple=8)
ROWS = 8


def make_config(case: str, start: str | pathlib.Path | None = None, **changes: Any) -> Any:
  """The config of a case; `start` is the folder with the finished stages of `make_parents`."""
  config = ExperimentConfig(
    name=case,
    steps=10,
    batch_size=ROWS,
    objective=OBJECTIVES[case](),
    data=DataConfig(
      prompt_length=4,
      response_length=6,
      held_out=12.0,
      reviews=ReviewsConfig(
        demonstrations=28, comparisons=28, prompts=28, ratings=28, rankings=28, step_ratings=28
      ),
    ),
    model=dataclasses.replace(MODEL),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_updates=2),
    evaluation=EvaluationConfig(prompts=0, records=0, batch_size=ROWS),
    checkpoint=CheckpointConfig(every=0),
    log=LogConfig(every=2, tensorboard=False),
  )
  if start is not None and case != 'sft':
    config.policy = InitConfig(init=str(pathlib.Path(start) / 'sft'))
    if objective_of(config.objective).data == 'prompts':
      config.reward_model = RewardModelInitConfig(init=str(pathlib.Path(start) / 'reward_model'))
  return dataclasses.replace(config, **changes)


def make_parents(folder: pathlib.Path) -> pathlib.Path:
  """Trains the SFT policy and the reward model that the other cases start from."""
  with devices(1):
    for case in ('sft', 'reward_model'):
      stages.run_stage(make_config(case, folder, steps=3), folder / case, root=folder)
  return folder


@contextlib.contextmanager
def devices(count: int) -> Iterator[None]:
  """Recipes that are built inside see the first devices only."""
  seen = functools.partial(make_mesh, devices=jax.devices()[:count])
  with mock.patch.object(parts, 'make_mesh', seen):
    yield


def build_recipe(
  config: ExperimentConfig, count: int = 1, folder: pathlib.Path | None = None
) -> Built:
  """The recipe of a config whose parents are finished, on the first `count` devices."""
  config.validate()
  parents = {role: Run(init) for role, (init, _) in config.inits().items()}
  with devices(count):
    return build(config, parents, feedback_of(config.data.response_length), folder=folder)


@functools.cache
def feedback_of(response_length: int) -> Any:
  """The feedback of every tiny config with responses of that length."""
  data = make_config('sft').data
  return load_feedback(dataclasses.replace(data, response_length=response_length))


class Finished(NamedTuple):
  """A stage's outcome, with the state that the loop ended with."""

  outcome: stages.StageOutcome
  loop: Outcome


def run_stage(
  config: ExperimentConfig,
  folder: pathlib.Path,
  *,
  wrap: Callable[[Any], Any] = lambda recipe: recipe,
  **options: Any,
) -> Finished:
  """Runs a stage on one device; `wrap` may change its recipe."""
  seen: list[Outcome] = []

  def train(name: str, recipe: Any, *arguments: Any) -> Outcome:
    seen.append(real(name, wrap(recipe), *arguments))
    return seen[-1]

  real = stages.train
  with mock.patch.object(stages, 'train', train), devices(1):
    outcome = stages.run_stage(config, folder, root=folder.parent, **options)
  return Finished(outcome, seen[-1])
