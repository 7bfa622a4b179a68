"""What is timed: jobs of a fixed size on made-up text, as stages like any other."""

import dataclasses
import json
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import measuring
from rlhf_jax.config import EvaluationConfig, ExperimentConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.data.config import DataConfig
from rlhf_jax.generation.config import GenerationConfig
from rlhf_jax.models import hf_model
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.objectives import ObjectiveConfig, demands_of
from rlhf_jax.objectives.dpo import DPOConfig
from rlhf_jax.objectives.grpo import GRPOConfig
from rlhf_jax.objectives.ppo import PPOConfig
from rlhf_jax.objectives.reward_model import RewardModelConfig
from rlhf_jax.objectives.sft import SFTConfig
from rlhf_jax.rollout.config import RolloutConfig
from rlhf_jax.training.optimizer import OptimizerConfig

# Llama-style decoders: 4.2M, 134M and 1.1B parameters.
SIZES = {
  'SMALL': ModelConfig(
    vocab_size=2048, width=256, mlp_width=688, layers=4, heads=4, max_length=512, scan_layers=False
  ),
  'BASE': ModelConfig(
    vocab_size=32_000,
    width=768,
    mlp_width=2048,
    layers=12,
    heads=12,
    max_length=512,
    scan_layers=False,
  ),
  '1B': ModelConfig(
    vocab_size=32_000,
    width=2048,
    mlp_width=8192,
    layers=16,
    heads=32,
    kv_heads=8,
    max_length=2048,
    scan_layers=False,
    dtype='bfloat16',
    attention='auto',
    remat='dots',
  ),
}
# Sizes that take hours on a processor, and their jobs: how many times longer texts are.
LARGE = {'1B': 8}
# Ids of the word tokenizer that stand for no word.
_SPECIAL = 4
# Rows of data: enough for a few batches, each of other rows.
_ROWS = 128


@dataclasses.dataclass(frozen=True)
class Job:
  """A kind of stage and its shape.

  Attributes:
    objective: what is trained.
    rows: demonstrations, comparisons or prompts a step.
    prompt: tokens of each prompt.
    response: tokens of each response.
    parents: stages that it starts from.
    old_logprobs: whose log-probs updates compare with; TRL reads samples again for PPO, but not for
      GRPO with a single update.
    ragged: texts have up to so many tokens, a third of them on average.
    stops: responses end with one of so many tokens; 0: they never do.
  """

  objective: Callable[[], ObjectiveConfig]
  rows: int
  prompt: int
  response: int
  parents: tuple[str, ...] = ()
  old_logprobs: str = 'trainer'
  ragged: bool = False
  stops: int = 0


# Of SFT all but a few tokens of a row are learnt, as peers learn whole texts.
JOBS = {
  'sft': Job(SFTConfig, 8, 2, 254),
  'reward': Job(RewardModelConfig, 8, 128, 128, ('policy',)),
  'dpo': Job(DPOConfig, 8, 128, 128, ('policy',)),
  'dpo_cached': Job(lambda: DPOConfig(reference='cached'), 8, 128, 128, ('policy',)),
  'generate': Job(SFTConfig, 32, 64, 128),
  'decode': Job(SFTConfig, 64, 64, 128),
  'ppo_iteration': Job(
    lambda: PPOConfig(epochs=4, minibatches=4), 32, 64, 64, ('policy', 'reward_model')
  ),
  # With a value function that has a trunk of its own, as TRL's has.
  'ppo_separate': Job(
    lambda: PPOConfig(epochs=4, minibatches=4, value_model='separate'),
    32,
    64,
    64,
    ('policy', 'reward_model'),
  ),
  'grpo_iteration': Job(
    lambda: GRPOConfig(samples=8), 4, 64, 64, ('policy', 'reward_model'), old_logprobs='sampler'
  ),
}


# Jobs whose texts are of all lengths, to compare ways of reading them.
RAGGED = {
  'sft_ragged': Job(SFTConfig, 16, 64, 64, ragged=True),
  'dpo_ragged': Job(DPOConfig, 8, 64, 64, ('policy',), ragged=True),
  # One token in 64 ends a response, on average, of an untrained decoder of 2048.
  'generate_ragged': Job(SFTConfig, 96, 64, 256, stops=32),
}


def job_of(name: str, size: str) -> Job:
  """The job of that name, with texts as long as the size has them."""
  job, times = (JOBS | RAGGED)[name], LARGE.get(size, 1)
  return dataclasses.replace(job, prompt=times * job.prompt, response=times * job.response)


def words(size: str) -> list[str]:
  """As many as the size's vocabulary has room for."""
  return [f'w{number}' for number in range(SIZES[size].vocab_size - _SPECIAL)]


def comparisons(size: str, job: Job) -> Iterator[dict[str, str]]:
  """Made-up comparisons, which fill every row so that no token is padding, or are ragged."""
  chance, known = random.Random(0), words(size)

  def text(most: int) -> str:
    count = 1 + int(most * chance.random() ** 2) if job.ragged else most
    return ' '.join(chance.choices(known, k=count))

  for _ in range(_ROWS):
    # <bos> and <eos> take a place each.
    yield {
      'prompt': text(job.prompt - 1),
      'chosen': ' ' + text(job.response - 1),
      'rejected': ' ' + text(job.response - 1),
    }


def config(
  job_name: str, size: str, folder: pathlib.Path, tokenizer: pathlib.Path, **changes: Any
) -> ExperimentConfig:
  """The stage of a job, on data and from parents in `folder`, which are made if they are missing.

  Args:
    job_name: one of JOBS or RAGGED.
    size: one of SIZES.
    folder: keeps data and parents for the next time.
    tokenizer: a folder with the size's vocabulary.
    changes: fields of the model, such as dtype.
  """
  job = job_of(job_name, size)
  kind = '_ragged' if job.ragged else ''
  data = folder / f'{size}_{job.prompt}_{job.response}{kind}.jsonl'
  if not data.exists():
    lines = [json.dumps(row) for row in comparisons(size, job)]
    data.write_text('\n'.join(lines) + '\n', encoding='utf-8')
  return ExperimentConfig(
    name=f'{job_name}_{size}',
    steps=10_000,
    batch_size=job.rows,
    objective=job.objective(),
    data=DataConfig(
      source='jsonl',
      path=str(data),
      held_out=8.0,
      prompt_length=job.prompt,
      response_length=job.response,
      tokenizer=str(tokenizer),
    ),
    model=dataclasses.replace(SIZES[size], vocab_size=0, **changes),
    policy=InitConfig(init=_parent(job, 'policy', folder)),
    reward_model=RewardModelInitConfig(init=_parent(job, 'reward_model', folder)),
    # Rollouts of full length: what is timed does not depend on what is sampled.
    generation=GenerationConfig(
      stop_at_eos=False, stop_tokens=tuple(range(_SPECIAL, _SPECIAL + job.stops))
    ),
    rollout=RolloutConfig(old_logprobs=job.old_logprobs),
    evaluation=EvaluationConfig(prompts=0, records=0),
  )


def peer_spec(job_name: str, size: str, tokenizer: pathlib.Path) -> dict[str, Any]:
  """What another library must know to do a job: `benchmarks/peers` says what it makes of it.

  Arguments are those of `config`.
  """
  job, model = job_of(job_name, size), SIZES[size]
  objective = job.objective()
  demands = demands_of(objective)
  return {
    'job': job_name,
    'rows': job.rows,
    'prompt': job.prompt,
    'response': job.response,
    'samples': demands.samples,
    'epochs': demands.epochs,
    'minibatches': demands.minibatches,
    'kl_coefficient': objective.kl_coefficient if isinstance(objective, GRPOConfig) else 0.0,
    'learning_rate': OptimizerConfig().learning_rate,
    'model': hf_model.to_config(model, hf_model.family_for(model, size)),
    'tokenizer': str(tokenizer.resolve()),
    'threads': measuring.threads(),
  }


def _parent(job: Job, role: str, folder: pathlib.Path) -> str | None:
  return str(folder / role) if role in job.parents else None
