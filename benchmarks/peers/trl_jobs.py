"""Does the jobs of `benchmarks.run` with TRL, a step at a time, in an environment that has it.

  python trl_jobs.py '{"job": "dpo", "rows": 8, "prompt": 128, ...}'

It is started by `benchmarks.run --peer=trl`, knows nothing of rlhf_jax, and speaks as
`benchmarks.peer` listens: a line of JSON on its output when it is loaded and after every step, a
step for every line of its input. Asked to check it says which packages are missing. A step is
all that a trainer does for one, from fetching the batch on; the clock stands still while it waits.

Everything is TRL's default but what the job fixes (sizes, float32, no evaluation, no saving, no
reports) and gradient checkpointing, which would make it slower.
"""

import importlib.util
import json
import os
import random
import shutil
import sys
import tempfile
import time

PACKAGES = ('torch', 'transformers', 'datasets', 'trl')
STARTED = time.perf_counter()
# Steps that nobody waits for to end: the input ends before.
MANY = 100_000
# Rows of data: enough for a few batches, each of other rows.
ROWS = 128


def main():
  spec = json.loads(sys.argv[1])
  if spec.get('check'):
    print(json.dumps({'missing': missing_for(spec['job'])}))
    return
  from importlib import metadata

  from conductor import Conductor  # beside this file

  conductor = Conductor({name: metadata.version(name) for name in (*PACKAGES, 'accelerate')})
  import torch

  torch.set_num_threads(spec['threads'])
  torch.manual_seed(0)
  with tempfile.TemporaryDirectory() as folder:
    JOBS[spec['job']](spec, folder, conductor)


def missing_for(job):
  """Which packages the environment lacks; they are looked for, not imported."""
  found = {name: importlib.util.find_spec(name) for name in PACKAGES}
  missing = [name for name, spec in found.items() if spec is None]
  if found['trl'] is not None and JOBS[job] is ppo_iteration:
    (folder,) = found['trl'].submodule_search_locations or ['']
    if not os.path.isdir(os.path.join(folder, 'experimental', 'ppo')):
      missing.append('trl.experimental.ppo')
  return missing


def load_export(spec, folder, conductor):
  """Reads a checkpoint folder, until every number was read, and writes it again."""
  import torch
  from transformers import AutoModelForCausalLM

  target = os.path.join(folder, 'written')
  conductor.loaded(None)
  while True:
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
      spec['checkpoint'], dtype=torch.float32, trust_remote_code=False
    )
    with torch.no_grad():
      for parameter in model.parameters():
        parameter.sum().item()  # files that are mapped are read when they are looked at
    loaded = time.perf_counter()
    model.save_pretrained(target)
    written = time.perf_counter()
    shutil.rmtree(target)
    conductor.done(load=loaded - start, export=written - loaded)


def generate(spec, folder, conductor):
  """Samples responses to prompts of the same length, none of which ends early."""
  import torch

  tokenizer = load_tokenizer(spec)
  model = language_model(spec, tokenizer).train(False)
  prompts = torch.tensor([token_ids(tokenizer, spec['prompt']) for _ in range(spec['rows'])])
  options = dict(max_new_tokens=spec['response'], do_sample=True, temperature=1.0, top_k=0)
  conductor.loaded(model.num_parameters())
  while True:
    with torch.no_grad():
      rows = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    assert rows.shape == (spec['rows'], spec['prompt'] + spec['response']), rows.shape
    conductor.done()


def sft(spec, folder, conductor):
  """Learns every token of whole rows."""
  from datasets import Dataset
  from trl import SFTConfig, SFTTrainer

  tokenizer = load_tokenizer(spec)
  length = spec['prompt'] + spec['response']
  rows = [{'input_ids': token_ids(tokenizer, length)} for _ in range(ROWS)]
  model = language_model(spec, tokenizer)
  trainer = SFTTrainer(
    model=model,
    args=SFTConfig(**common(spec, folder), max_length=length),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    callbacks=[clock(conductor, model)],
  )
  expect(trainer.train_dataset, input_ids=length, labels=length)
  trainer.train()


def reward(spec, folder, conductor):
  """Learns which of two texts is preferred."""
  from trl import RewardConfig, RewardTrainer

  tokenizer = load_tokenizer(spec)
  model = scorer(spec, tokenizer)
  trainer = RewardTrainer(
    model=model,
    args=RewardConfig(**common(spec, folder), max_length=spec['prompt'] + spec['response']),
    train_dataset=comparisons(spec, tokenizer),
    processing_class=tokenizer,
    callbacks=[clock(conductor, model)],
  )
  length = spec['prompt'] + spec['response']
  expect(trainer.train_dataset, chosen_ids=length, rejected_ids=length)
  trainer.train()


def dpo(spec, folder, conductor):
  """Learns from comparisons; the reference's log-probs are computed anew, or once before."""
  from trl import DPOConfig, DPOTrainer

  tokenizer = load_tokenizer(spec)
  model = stored(language_model(spec, tokenizer), folder)
  trainer = DPOTrainer(
    model=model,
    args=DPOConfig(
      **common(spec, folder),
      max_length=spec['prompt'] + spec['response'],
      precompute_ref_log_probs=spec['job'] == 'dpo_cached',
    ),
    train_dataset=comparisons(spec, tokenizer),
    processing_class=tokenizer,
    callbacks=[clock(conductor, model)],
  )
  response = spec['response']
  expect(
    trainer.train_dataset, prompt_ids=spec['prompt'], chosen_ids=response, rejected_ids=response
  )
  trainer.train()


def grpo_iteration(spec, folder, conductor):
  """Samples groups of responses, scores them with a reward model, and updates once."""
  from datasets import Dataset
  from trl import GRPOConfig, GRPOTrainer

  tokenizer = load_tokenizer(spec)
  model = stored(language_model(spec, tokenizer), folder)
  rows = [{'prompt': text_of(tokenizer, spec['prompt'])} for _ in range(ROWS)]
  settings = common(spec, folder)
  settings['per_device_train_batch_size'] = spec['rows'] * spec['samples']
  trainer = GRPOTrainer(
    model=model,
    reward_funcs=scorer(spec, tokenizer),
    args=GRPOConfig(
      **settings,
      num_generations=spec['samples'],
      max_completion_length=spec['response'],
      beta=spec['kl_coefficient'],
      generation_kwargs={'min_new_tokens': spec['response']},
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    reward_processing_classes=tokenizer,
    callbacks=[clock(conductor, model)],
  )
  trainer.train()


def ppo_iteration(spec, folder, conductor):
  """Samples responses, scores them, and updates policy and value model for some epochs."""
  os.environ['TRL_EXPERIMENTAL_SILENCE'] = '1'
  from datasets import Dataset
  from trl.experimental.ppo import PPOConfig, PPOTrainer

  tokenizer = load_tokenizer(spec)
  model = language_model(spec, tokenizer)
  rows = [{'input_ids': token_ids(tokenizer, spec['prompt'])} for _ in range(ROWS)]
  settings = common(spec, folder)
  del settings['max_steps']
  trainer = PPOTrainer(
    args=PPOConfig(
      **settings,
      num_mini_batches=spec['minibatches'],
      num_ppo_epochs=spec['epochs'],
      local_rollout_forward_batch_size=spec['rows'],
      response_length=spec['response'],
      total_episodes=MANY * spec['rows'],
      num_sample_generations=0,
    ),
    processing_class=tokenizer,
    model=model,
    ref_model=language_model(spec, tokenizer),
    reward_model=scorer(spec, tokenizer),
    value_model=scorer(spec, tokenizer),
    train_dataset=Dataset.from_list(rows),
    eval_dataset=Dataset.from_list(rows[: spec['rows']]),
    callbacks=[clock(conductor, model)],
  )
  trainer.train()


JOBS = {
  'load_export': load_export,
  'generate': generate,
  'decode': generate,
  'sft': sft,
  'reward': reward,
  'dpo': dpo,
  'dpo_cached': dpo,
  'grpo_iteration': grpo_iteration,
  'ppo_iteration': ppo_iteration,
  'ppo_separate': ppo_iteration,
  'compile': sft,
}


def common(spec, folder):
  """What all trainers are told."""
  return dict(
    output_dir=folder,
    max_steps=MANY,
    per_device_train_batch_size=spec['rows'],
    learning_rate=spec['learning_rate'],
    lr_scheduler_type='constant',
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    dataloader_pin_memory=False,
    logging_strategy='no',
    save_strategy='no',
    eval_strategy='no',
    report_to='none',
    disable_tqdm=True,
  )


def clock(conductor, model):
  """A callback that holds the trainer between two steps."""
  from transformers import TrainerCallback

  class Clock(TrainerCallback):
    def on_train_begin(self, *args, **kwargs):
      conductor.loaded(model.num_parameters())

    def on_step_end(self, *args, **kwargs):
      conductor.done()

  return Clock()


def load_tokenizer(spec):
  from transformers import AutoTokenizer

  return AutoTokenizer.from_pretrained(spec['tokenizer'], trust_remote_code=False)


def language_model(spec, tokenizer):
  """A policy that writes responses of full length: no token ends one."""
  from transformers import AutoModelForCausalLM

  model = AutoModelForCausalLM.from_config(architecture(spec, tokenizer))
  model.generation_config.eos_token_id = None
  model.generation_config.pad_token_id = tokenizer.pad_token_id
  return model


def stored(model, folder):
  """The model, in a folder of its own too: trainers load their reference from there."""
  model.config._name_or_path = os.path.join(folder, 'model')
  model.save_pretrained(model.config._name_or_path)
  return model


def scorer(spec, tokenizer):
  """A reward or value model."""
  from transformers import AutoModelForSequenceClassification

  return AutoModelForSequenceClassification.from_config(architecture(spec, tokenizer, num_labels=1))


def architecture(spec, tokenizer, **others):
  from transformers import AutoConfig

  return AutoConfig.for_model(
    **spec['model'],
    **others,
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
  )


def comparisons(spec, tokenizer):
  """Texts whose tokens fill the job's rows: the trainers add the token that ends a response."""
  from datasets import Dataset

  def response():
    return ' ' + words(tokenizer, spec['response'] - 1)

  return Dataset.from_list(
    [
      {
        'prompt': text_of(tokenizer, spec['prompt']),
        'chosen': response(),
        'rejected': response(),
      }
      for _ in range(ROWS)
    ]
  )


def expect(rows, **lengths):
  """Checks that all rows have the tokens of the job."""
  assert len(rows) == ROWS, len(rows)
  for name, length in lengths.items():
    found = {len(row[name]) for row in rows}
    assert found == {length}, f'{name}: expected {length} tokens, found {found}'


def text_of(tokenizer, length):
  """A text that the tokenizer turns into so many tokens."""
  text = words(tokenizer, length - len(tokenizer('')['input_ids']))
  assert len(tokenizer(text)['input_ids']) == length, text
  return text


def words(tokenizer, count):
  return ' '.join(tokenizer.convert_ids_to_tokens(token_ids(tokenizer, count)))


def token_ids(tokenizer, count):
  """Ids by chance, none of a special token."""
  special = set(tokenizer.all_special_ids)
  return random.choices([i for i in range(len(tokenizer)) if i not in special], k=count)


if __name__ == '__main__':
  main()
