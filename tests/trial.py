"""A Llama checkpoint of transformers through SFT, reward model, DPO and PPO with LoRA, and back.

Eight simulated devices as data 2 x fsdp 2 x tensor 2. `tests/trial_test.py` loads what is exported
with the library, `make parity` with transformers.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax import stages
from rlhf_jax.common import prng
from rlhf_jax.config import ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.data.config import DataConfig
from rlhf_jax.feedback.dataset import Feedback, Split
from rlhf_jax.generation.config import GenerationConfig
from rlhf_jax.hf_folder import open_source
from rlhf_jax.models import hf_export
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.objectives.dpo import DPOConfig
from rlhf_jax.objectives.ppo import PPOConfig
from rlhf_jax.objectives.reward_model import RewardModelConfig
from rlhf_jax.objectives.sft import SFTConfig
from rlhf_jax.recipes.completions import make_completer
from rlhf_jax.recipes.finished import open_run
from rlhf_jax.recipes.parts import abstract_decoder
from rlhf_jax.runs import ASSETS, Run
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh
from rlhf_jax.training.optimizer import OptimizerConfig
from tests import tiny

CHECKPOINT = Path(__file__).resolve().parent / 'golden' / 'hf' / 'trial_llama'
MESH = MeshConfig(data=2, fsdp=2, tensor=2)
LORA = AdapterConfig(method='lora', rank=4, alpha=8.0, targets=('query', 'value', 'out', 'down'))
PROMPTS = ('the plot was', 'i think the acting', 'the music')
NEW_TOKENS = 6


def run(folder: Path) -> dict[str, list[list[int]]]:
  """Trains all stages under a folder; greedy tokens of the policies, which are exported beside.

  The folder then has a run and an export `NAME_folder` for 'dpo' and 'ppo'.
  """
  stage('sft', SFTConfig(), folder, CHECKPOINT)
  stage('reward_model', RewardModelConfig(normalization_samples=16), folder, folder / 'sft')
  stage('dpo', DPOConfig(beta=0.1), folder, folder / 'sft')
  ppo = PPOConfig(epochs=2, minibatches=2, value_model='reward_model')
  judge = RewardModelInitConfig(init=str(folder / 'reward_model'))
  stage('ppo', ppo, folder, folder / 'sft', reward_model=judge)
  found = {}
  for name in ('dpo', 'ppo'):
    export(Run(folder / name), folder / f'{name}_folder')
    found[name] = greedy(folder / name)
  return found


def stage(name: str, objective: Any, folder: Path, start: Path, **changes: Any) -> None:
  """Runs one stage with low-rank matrices on all eight devices."""
  data = tiny.make_config('sft').data
  config = ExperimentConfig(
    name=name,
    steps=4,
    batch_size=16,
    objective=objective,
    data=dataclasses.replace(data, response_length=NEW_TOKENS, prompt_length=6),
    adapter=LORA,
    policy=InitConfig(init=str(start)),
    optimizer=OptimizerConfig(learning_rate=3e-2),
    mesh=MESH,
    **changes,
  )
  config.evaluation.prompts = config.evaluation.records = 0
  config.evaluation.batch_size = 16
  config.log.tensorboard = False
  stages.run_stage(config, folder / name, root=folder)


def export(run: Run, target: Path) -> None:
  """The policy with its matrices merged, as a folder that transformers loads."""
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  params = run.restore_role('policy', abstract_decoder(run.model, mesh))
  assets = hf_export.read_assets(run.folder / ASSETS)
  hf_export.export_policy(target, run.model, params, assets)


def greedy(source: Path) -> list[list[int]]:
  """The likeliest tokens after each prompt, of a run or of a folder."""
  opened = open_source(source)
  config = dataclasses.replace(
    opened.config,
    data=DataConfig(prompt_length=6, response_length=NEW_TOKENS),
    generation=GenerationConfig(temperature=0.0, stop_at_eos=False),
    adapter=AdapterConfig(),
    model=ModelConfig(),
  )
  nothing = Feedback('', Split(), Split())
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  finished = open_run(opened, config, nothing, mesh, parents={})
  completer = make_completer(finished)
  return [one.tokens for one in completer(PROMPTS, prng.base_key(0), 1)]


def prompt_ids() -> list[list[int]]:
  """The prompts as the policy reads them."""
  tokenizer = open_source(CHECKPOINT).tokenizer()
  start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  return [[*start, *row] for row in tokenizer.encode_batch(PROMPTS)]


def differ(first: Any, second: Any) -> float:
  """The largest difference of two trees."""
  gaps = jax.tree.map(
    lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), first, second
  )
  return max(jax.tree.leaves(gaps))
