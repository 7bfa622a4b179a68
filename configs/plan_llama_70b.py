"""PPO of a 70B policy with a reference and a 70B reward model, to be planned before it is bought.

  python -m experiments.plan --config=configs/plan_llama_70b.py \\
    --config.mesh.data=1 --config.mesh.fsdp=32 --config.mesh.tensor=8 --accelerator=H100

The parents are this file's own stages 'sft' and 'reward_model', which a plan does not run.
"""

from rlhf_jax.config import ExperimentConfig, InitConfig, RewardModelInitConfig, check_argument
from rlhf_jax.data.config import DataConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.objectives.ppo import PPOConfig
from rlhf_jax.objectives.reward_model import RewardModelConfig
from rlhf_jax.objectives.sft import SFTConfig
from rlhf_jax.training.optimizer import OptimizerConfig

PARENT = 'configs/plan_llama_70b.py'


def llama_70b() -> ModelConfig:
  """Llama 3.1 70B (its config.json), computed in bfloat16 with everything on that saves memory."""
  return ModelConfig(
    vocab_size=128_256,
    width=8192,
    layers=80,
    heads=64,
    kv_heads=8,
    head_dim=128,
    mlp_width=28_672,
    norm_epsilon=1e-5,
    rotary_theta=500_000.0,
    rotary_scaling='llama3',
    rotary_scaling_factor=8.0,
    dtype='bfloat16',
    remat='full',
    vocab_chunk=4096,
    scan_layers=True,
  )


def get_config(arg: str | None = None) -> ExperimentConfig:
  """The stage, or its parents: 'sft', 'reward_model'."""
  check_argument(arg, ('sft', 'reward_model'))
  stage = ExperimentConfig(
    name=f'llama_70b_{arg}' if arg else 'llama_70b_ppo',
    batch_size=256,
    data=DataConfig(
      source='jsonl', path='comparisons.jsonl', prompt_length=1024, response_length=1024
    ),
    optimizer=OptimizerConfig(learning_rate=1e-6, schedule='cosine'),
  )
  if arg == 'sft':
    stage.objective, stage.model = SFTConfig(), llama_70b()
    return stage
  stage.policy = InitConfig(init=f'{PARENT}:sft')
  if arg == 'reward_model':
    stage.objective = RewardModelConfig()
    return stage
  stage.objective = PPOConfig(epochs=1, minibatches=1, value_model='shared')
  stage.reward_model = RewardModelInitConfig(init=f'{PARENT}:reward_model')
  stage.accumulation = 8
  return stage
