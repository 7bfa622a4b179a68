"""Stages for programs in two processes: configs by case, and a record of what a process writes."""

import os
import sys
from typing import Any

from rlhf_jax.config import ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.rollout.config import RewardConfig
from rlhf_jax.sharding.mesh import MeshConfig
from tests import tiny

# A file that is to name what this process writes with Python below the folder.
RECORD, FOLDER = 'RLHF_JAX_TEST_RECORD', 'RLHF_JAX_TEST_FOLDER'
# Enough for a signal to arrive in between.
DPO_STEPS = 40


def get_config(arg: str) -> ExperimentConfig:
  """A tiny stage, whose parents are stages of this file; with processes of 4 devices each.

  The first mesh has its data axis across the processes, DPO's its fsdp axis. 'lora' is a short DPO
  with low-rank matrices, from a checkpoint folder; PPO starts from a short one of all parameters.
  """
  if RECORD in os.environ:
    sys.addaudithook(_record)
  case = 'dpo' if arg in ('lora', 'brief_dpo') else arg
  config: ExperimentConfig = tiny.make_config(case, steps=4, name=arg)
  config.mesh = MeshConfig(data=2, fsdp=2, tensor=2)
  config.evaluation.prompts = tiny.ROWS if arg in ('sft', 'ppo') else 0
  config.evaluation.records = 0 if arg == 'ppo' else tiny.ROWS
  if arg != 'sft':
    config.policy = InitConfig(init=f'{__file__}:sft')
  if arg == 'ppo':
    config.policy = InitConfig(init=f'{__file__}:brief_dpo')
    config.reward_model = RewardModelInitConfig(init=f'{__file__}:reward_model')
    # One on the devices, and one that each process asks for its rows.
    config.rollout.rewards = (RewardConfig(), RewardConfig(source='task', weight=0.5))
  if arg == 'brief_dpo':
    config.mesh = MeshConfig(data=1, fsdp=4, tensor=2)
  if arg == 'dpo':
    config.mesh = MeshConfig(data=1, fsdp=4, tensor=2)
    config.steps, config.log.every = DPO_STEPS, 1
    config.optimizer.learning_rate = 1e-3
  if arg == 'lora':
    config.mesh = MeshConfig(data=1, fsdp=4, tensor=2)
    config.model, config.steps = ModelConfig(), 3
    config.adapter = AdapterConfig(method='lora', rank=2, targets=('query', 'value', 'down'))
  return config


def _record(event: str, arguments: Any) -> None:
  """Notes files that are opened for writing, and what else changes a folder."""
  if event == 'open':
    path, _, flags = arguments
    if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
      return
  elif event in ('os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'shutil.rmtree'):
    path = arguments[0]
  else:
    return
  path = os.fspath(path) if isinstance(path, str | os.PathLike) else ''
  if isinstance(path, str) and path.startswith(os.environ[FOLDER]):
    with open(os.environ[RECORD], 'a', encoding='utf-8') as file:
      file.write(f'{event} {path}\n')
