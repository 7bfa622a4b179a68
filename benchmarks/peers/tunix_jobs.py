"""Does the jobs of `benchmarks.run` with Tunix, a step at a time, in an environment that has it.

  python tunix_jobs.py '{"job": "dpo", "rows": 8, "prompt": 128, ...}'

It is started by `benchmarks.run --peer=tunix`, knows nothing of rlhf_jax, and speaks as
`benchmarks.peer` listens: a line of JSON on its output when it is loaded and after every step, a
step for every line of its input. Asked to check it says which packages are missing.

Everything is Tunix's default but what the job fixes (sizes, float32, no evaluation, no saving). Its
models are its Llama 3, with tables of their own for reading and writing. Rewards are a function of
the texts that costs nothing, since it has no trainer of reward models: less work than ours.
"""

import importlib.util
import json
import os
import sys

PACKAGES = ('jax', 'tunix', 'transformers')
# Steps that nobody waits for to end: the input ends before.
MANY = 100_000


def main():
  spec = json.loads(sys.argv[1])
  if spec.get('check'):
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    print(json.dumps({'missing': missing}))
    return
  from importlib import metadata

  from conductor import Conductor  # beside this file

  names = ('google-tunix', 'jax', 'flax', 'transformers')
  conductor = Conductor({name: metadata.version(name) for name in names})
  try:
    JOBS[spec['job']](spec, conductor)
  except SystemExit:
    os._exit(0)  # some of its threads wait for more


def step_done(conductor, model):
  """A step is over once the parameters are there."""
  import jax
  from flax import nnx

  jax.block_until_ready(nnx.state(model))
  conductor.done()


def sft(spec, conductor):
  """Learns every token of whole rows."""
  import jax
  from tunix.sft import peft_trainer, utils

  model = language_model(spec)
  length = spec['prompt'] + spec['response']
  trainer = peft_trainer.PeftTrainer(model, optimizer(spec), training(peft_trainer.TrainingConfig))

  def inputs(batch):
    mask = batch.input_tokens != -1
    return {
      'input_tokens': batch.input_tokens,
      'input_mask': batch.input_mask,
      'positions': utils.build_positions_from_mask(mask),
      'attention_mask': utils.make_causal_attn_mask(mask),
    }

  def batches():
    tokens = draw(spec)
    conductor.loaded(size_of(model))
    while True:
      rows = tokens(spec['rows'], length)
      yield peft_trainer.TrainingInput(rows, jax.numpy.ones(rows.shape, bool))
      step_done(conductor, model)

  trainer.with_gen_model_input_fn(inputs).train(batches())


def dpo(spec, conductor):
  """Learns from comparisons; the reference's log-probs are computed in every step."""
  import numpy as np
  from tunix.sft.dpo import dpo_trainer

  model, reference = language_model(spec), language_model(spec)
  config = training(dpo_trainer.DPOTrainingConfig, beta=0.1)
  trainer = dpo_trainer.DPOTrainer(model, reference, optimizer(spec), config)

  def batches():
    tokens = draw(spec)
    conductor.loaded(size_of(model))
    while True:
      prompt = tokens(spec['rows'], spec['prompt'])
      chosen, rejected = (tokens(spec['rows'], spec['response']) for _ in range(2))
      masks = np.ones(prompt.shape, bool), np.ones(chosen.shape, bool)
      yield dpo_trainer.TrainingInput(
        prompt_ids=prompt,
        prompt_mask=masks[0],
        chosen_ids=chosen,
        chosen_mask=masks[1],
        rejected_ids=rejected,
        rejected_mask=masks[1],
      )
      step_done(conductor, model)

  trainer.train(batches())


def generate(spec, conductor):
  """Samples responses to prompts of the same length, none of which ends early."""
  from tunix.generate import sampler as sampler_lib

  tokenizer, model = load_tokenizer(spec), language_model(spec)
  config = model.config
  sampler = sampler_lib.Sampler(
    model,
    tokenizer,
    sampler_lib.CacheConfig(
      cache_size=spec['prompt'] + spec['response'],
      num_layers=config.num_layers,
      num_kv_heads=config.num_kv_heads,
      head_dim=config.head_dim,
    ),
  )
  prompts = texts(spec, tokenizer, spec['rows'])
  conductor.loaded(size_of(model))
  number = 0
  while True:
    found = sampler(
      prompts,
      max_generation_steps=spec['response'],
      max_prompt_length=spec['prompt'],
      temperature=1.0,
      top_p=1.0,
      eos_tokens=[-1],
      seed=number,
    )
    lengths = {len(row) for row in found.tokens}
    assert lengths == {spec['response']}, lengths
    number += 1
    step_done(conductor, model)


def grpo_iteration(spec, conductor):
  """Samples groups of responses, and updates once."""
  from tunix.rl.grpo import grpo_learner

  timed_learner(
    spec,
    conductor,
    grpo_learner.GRPOLearner,
    grpo_learner.GRPOConfig(num_generations=spec['samples'], beta=spec['kl_coefficient']),
    batch=spec['rows'],
    critic=False,
  )


def ppo_iteration(spec, conductor):
  """Samples responses, and updates policy and value model for some epochs."""
  from tunix.rl.ppo import ppo_learner

  timed_learner(
    spec,
    conductor,
    ppo_learner.PPOLearner,
    ppo_learner.PPOConfig(num_iterations=spec['epochs']),
    batch=spec['rows'] // spec['minibatches'],
    critic=True,
  )


JOBS = {
  'generate': generate,
  'decode': generate,
  'sft': sft,
  'dpo': dpo,
  'grpo_iteration': grpo_iteration,
  'ppo_iteration': ppo_iteration,
  'ppo_separate': ppo_iteration,
}


def timed_learner(spec, conductor, learner, algorithm, *, batch, critic):
  """Runs one of its learners, held between two global steps; `batch` prompts an update."""
  import jax
  import numpy as np
  from tunix.rl import rl_cluster, utils
  from tunix.rl.rollout import base_rollout

  tokenizer = load_tokenizer(spec)
  policy, reference = language_model(spec), language_model(spec)
  values = utils.create_critic_model(language_model(spec)) if critic else None
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1])[None], ('fsdp', 'tp'))
  config = rl_cluster.RLTrainingConfig(
    eval_every_n_steps=MANY,
    max_steps=MANY,
    actor_optimizer=optimizer(spec),
    critic_optimizer=optimizer(spec) if critic else None,
    mini_batch_size=batch,
  )
  cluster = rl_cluster.RLCluster(
    actor=policy,
    reference=reference,
    critic=values,
    tokenizer=tokenizer,
    cluster_config=rl_cluster.ClusterConfig(
      role_to_mesh=dict.fromkeys(rl_cluster.Role, mesh),
      training_config=config,
      rollout_config=base_rollout.RolloutConfig(
        max_tokens_to_generate=spec['response'],
        max_prompt_length=spec['prompt'],
        kv_cache_size=spec['prompt'] + spec['response'],
        temperature=1.0,
        eos_tokens=[-1],
      ),
    ),
  )

  def reward(prompts, completions, **others):
    del prompts, others
    return [float(len(set(text))) for text in completions]

  trainer = learner(cluster, algorithm, reward_fns=reward)
  make_step = trainer._run_global_step

  def held(*arguments):
    make_step(*arguments)
    step_done(conductor, cluster.actor_trainer.model)

  trainer._run_global_step = held

  def batches():
    while True:
      yield {'prompts': np.array(texts(spec, tokenizer, spec['rows']))}

  conductor.loaded(size_of(policy))
  with mesh:
    trainer.train(batches())


def language_model(spec):
  """Its Llama 3, in float32."""
  import jax.numpy as jnp
  from flax import nnx
  from tunix.models.llama3 import model as llama

  given = spec['model']
  config = llama.ModelConfig(
    num_layers=given['num_hidden_layers'],
    vocab_size=given['vocab_size'],
    embed_dim=given['hidden_size'],
    hidden_dim=given['intermediate_size'],
    num_heads=given['num_attention_heads'],
    head_dim=given['hidden_size'] // given['num_attention_heads'],
    num_kv_heads=given['num_key_value_heads'],
    rope_theta=int(given.get('rope_theta', 10_000)),
    norm_eps=given.get('rms_norm_eps', 1e-5),
  )

  class Decoder(llama.Llama3):
    def __call__(self, *arguments, segment_ids=None, **others):
      del segment_ids  # of packed rows: its value models are called with it, Llama 3 lacks it
      return super().__call__(*arguments, **others)

  model = Decoder(config, rngs=nnx.Rngs(0))
  types = {leaf.dtype for leaf in nnx.state(model, nnx.Param).flat_state().leaves}
  assert types == {jnp.dtype('float32')}, types
  return model


def size_of(model):
  import jax
  from flax import nnx

  return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def optimizer(spec):
  """What the other trainers have too."""
  import optax

  return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(spec['learning_rate']))


def training(config, **others):
  return config(eval_every_n_steps=MANY, max_steps=MANY, pbar_description=None, **others)


def draw(spec):
  """Ids by chance, none of a special token."""
  import numpy as np

  tokenizer = load_tokenizer(spec)
  ids = [i for i in range(len(tokenizer)) if i not in set(tokenizer.all_special_ids)]
  chance = np.random.default_rng(0)
  return lambda rows, length: chance.choice(ids, (rows, length)).astype(np.int32)


def texts(spec, tokenizer, count):
  """Texts that fill the job's prompts; its sampler writes a <bos> before each."""
  rows = draw(spec)(count, spec['prompt'] - 1)
  return [' '.join(tokenizer.convert_ids_to_tokens(row.tolist())) for row in rows]


def load_tokenizer(spec):
  from transformers import AutoTokenizer

  return AutoTokenizer.from_pretrained(spec['tokenizer'], trust_remote_code=False)


if __name__ == '__main__':
  main()
