"""Asks a finished run's own evaluation questions of its saved parameters, with 95% intervals.

  python -m experiments.evaluate --run=runs/dpo --prompts=1000
  python -m experiments.evaluate --run=runs/dpo --reward_model=runs/other_rm --json=dpo.json
  python -m experiments.evaluate --run=runs/rm --data_path=harmless_base_test.jsonl.gz
  python -m experiments.evaluate --model=folders/policy --config=configs/sft.py --prompts=1000
  python -m experiments.evaluate --run=runs/dpo --fsdp=4 --tensor=2   # on eight devices

A reward model, DPO or CPL: does it prefer what people preferred, on held-out comparisons? SFT: how
likely are held-out demonstrations? Every policy answers held-out prompts: KL to its reference, in
nats a response; the reward model's score (proxy); what its objective pays, where that is something
else (reward); the gold reward where the task has one; the win rate against the reference's own
answers, judged by gold reward, else by the proxy, else by what the objective pays.

Intervals are over prompts or records, of these parameters: they say nothing of how training varies
between seeds (experiments.compare does). With the run's own settings the numbers are those of its
last row of evaluations.jsonl. Data must be the records that the run learnt from and held out.

A checkpoint folder (--model) is asked what the stage of --config would be asked: its data, held out
in the same way, and its evaluation; it is computed and written to as that stage says
(config.model's dtype, remat and the like, data.chat_template). What the model saw in training is
not known here. Bad records that are set aside go to quarantine/ beside --json, or here.

--json writes {"schema": 1, "run" (a folder given as --model too), "name", "objective",
"checkpoint", "step", "params_sha256" (of the final parameters), "reference", "reward_model"
(directories or null), "data_fingerprint" (null for a folder),
"evaluation": {"prompts", "records", "batch_size", "seed"}, "metrics": {...}}; a metric is {"mean",
"low", "high", "count"}: the ends of its interval and the number of prompts or records, null where
a number has no interval (calibration error).

Exit codes: 0 done, 1 something given is wrong (one message says what), 130 ended by Ctrl-C: there
is no state to save.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags

from experiments import cli, cluster
from rlhf_jax import reading
from rlhf_jax.common import processes
from rlhf_jax.common.errors import RunError, UserError
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.config_parts import CHECKPOINTS
from rlhf_jax.data.segments import ControlFeedback
from rlhf_jax.evaluation.intervals import Measured, measured
from rlhf_jax.feedback.dataset import Feedback
from rlhf_jax.hf_folder import HfFolder, open_source
from rlhf_jax.objectives import objective_of
from rlhf_jax.origins import is_term
from rlhf_jax.recipes.finished import Finished, open_run, own_questions
from rlhf_jax.recipes.parts import Parts
from rlhf_jax.recipes.probes import Question, ask, best_of_n_question
from rlhf_jax.recipes.rewards import load_reward_model, reward_fingerprints
from rlhf_jax.runs import Run, write_json
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh

RUN = flags.DEFINE_string('run', None, 'The directory of a finished run.')
MODEL = flags.DEFINE_string(
  'model', None, "In place of --run: a checkpoint folder of Hugging Face's, or hf:owner/name."
)
CONFIG = cli.define_config('What a --model is asked: the stage whose data and questions they are.')
CHECKPOINT = flags.DEFINE_enum('checkpoint', 'final', CHECKPOINTS, 'Which parameters.')
REWARD_MODEL = flags.DEFINE_string(
  'reward_model', None, "Another reward model, a run or a folder. Default: the run's own."
)
REFERENCE = flags.DEFINE_string(
  'reference',
  None,
  'Another reference, a run or a folder, for KL, win rate, and what DPO implies. Default: its own.',
)
DATA_PATH = flags.DEFINE_string(
  'data_path', None, 'Where the data file lies now. Default: where the run found it.'
)
HELD_OUT_PATH = flags.DEFINE_string(
  'held_out_path', None, 'Where a held-out file of its own lies now, if the run had one.'
)
PROMPTS = flags.DEFINE_integer('prompts', None, 'Held-out prompts to answer; 0: none.', 0)
RECORDS = flags.DEFINE_integer('records', None, 'Held-out records to score; 0: none.', 0)
BATCH_SIZE = flags.DEFINE_integer('batch_size', None, 'Rows a forward pass.', 1)
SEED = flags.DEFINE_integer('seed', None, 'Seeds the sampled responses.', 0, 2**32 - 1)
BEST_OF_N = flags.DEFINE_list(
  'best_of_n',
  [],
  'Sizes, e.g. 4,16,64: what the best of so many responses by the reward model would be worth.',
)
JSON = flags.DEFINE_string('json', None, 'A file to write the numbers to.')
FSDP = flags.DEFINE_integer(
  'fsdp',
  None,
  'Parts that parameters are cut into, each for its own rows. With one of --fsdp and --tensor the '
  'other is 1, and the product must divide the devices. Default: both as the run was trained where '
  'the devices allow it, else the whole model on each.',
  1,
)
TENSOR = flags.DEFINE_integer(
  'tensor', None, "Devices that share the model's matrices; it must divide its heads.", 1
)

# Best-of-n is averaged over subsets of so many times the largest n responses.
_SUBSETS = 2


def mesh_of(run: Run) -> MeshConfig:
  """Models divided as flags say, or over fsdp and tensor as they were trained where that can be."""
  given = cli.not_none({'fsdp': FSDP.value, 'tensor': TENSOR.value})
  mesh, devices = MeshConfig(**given), jax.device_count()
  if given:
    if devices % (mesh.fsdp * mesh.tensor):
      raise UserError(
        f'--fsdp={mesh.fsdp} --tensor={mesh.tensor}: expected a product that divides the {devices} '
        'devices.'
      )
    return mesh
  trained = run.config.mesh
  parts = trained.fsdp * trained.tensor
  if min(trained.fsdp, trained.tensor) < 1 or devices % parts:
    return mesh
  return MeshConfig(fsdp=trained.fsdp, tensor=trained.tensor)


def main() -> int:
  path = cli.json_path(JSON.value)
  run = cli.run_or_model(RUN.value, MODEL.value)
  run.require_result()
  config, parents = configure(run)
  mesh = make_mesh(mesh_of(run))
  devices = mesh.shape['data'] * mesh.shape['fsdp']
  if config.evaluation.batch_size % devices:
    raise UserError(
      f'--batch_size={config.evaluation.batch_size}: expected a multiple of the {devices} devices '
      'that share the rows.'
    )
  opened = open_run(
    run, config, load_data(run, config), mesh, parents=parents, checkpoint=CHECKPOINT.value
  )
  with jax.set_mesh(mesh):
    questions = [*own_questions(opened.parts), *best_of_n_questions(opened)]
    if not questions:
      raise UserError(f'{run.source}: nothing to ask; give --prompts or --records.')
    answers = ask(questions, opened.params, run.step(CHECKPOINT.value))
  metrics = measured(answers.scalars, answers.arrays)
  if processes.is_main():
    print_table(run, config, metrics)
    if path is not None:
      write_json(path, to_json(run, config, parents, metrics))
  return cli.DONE


def best_of_n_questions(opened: Finished) -> list[Question]:
  """The question of --best_of_n, if it is asked."""
  try:
    sizes = [int(size) for size in BEST_OF_N.value]
  except ValueError as error:
    raise UserError(
      f'--best_of_n={",".join(BEST_OF_N.value)}: expected numbers, e.g. 4,16.'
    ) from error
  if not sizes:
    return []
  if min(sizes) < 1:
    raise UserError(f'--best_of_n={",".join(BEST_OF_N.value)}: expected numbers >= 1.')
  parts = opened.parts
  if not parts.config.evaluation.prompts:
    raise UserError(f'--best_of_n={",".join(BEST_OF_N.value)}: it takes prompts; raise --prompts.')
  reward_model = load_reward_model(parts) if isinstance(parts, Parts) else None
  if not isinstance(parts, Parts) or reward_model is None or 'policy' not in opened.params:
    raise UserError(
      f'--best_of_n={",".join(BEST_OF_N.value)}: it takes a policy over text and a reward model '
      'that judges. Name one with --reward_model.'
    )
  return [best_of_n_question(parts, reward_model, sizes, _SUBSETS * max(sizes))]


def configure(run: Run) -> tuple[ExperimentConfig, dict[str, Run]]:
  """The run's config with what flags give, and the runs it is measured against, by role."""
  config, parents = asked_config(run), run.parents()
  given = {
    'prompts': PROMPTS.value,
    'records': RECORDS.value,
    'batch_size': BATCH_SIZE.value,
    'seed': SEED.value,
  }
  paths = {'path': DATA_PATH.value, 'held_out_path': HELD_OUT_PATH.value}
  config = dataclasses.replace(
    config,
    evaluation=dataclasses.replace(config.evaluation, **cli.not_none(given)),
    data=dataclasses.replace(config.data, **cli.not_none(paths)),
  )
  config.data.validate('data')
  for role, folder in (('policy', REFERENCE.value), ('reward_model', REWARD_MODEL.value)):
    if folder is None:
      continue
    other = open_source(folder)
    if objective_of(other.config.objective).trains != role:
      flag = 'reward_model' if role == 'reward_model' else 'reference'
      wanted = 'a reward model' if role == 'reward_model' else 'a policy'
      raise RunError(f'--{flag}={folder}: expected {wanted}.')
    if role == 'reward_model':  # it stands in the place of a whole ensemble
      kept = [name for name in parents if name == 'policy' or is_term(name)]
      parents = {name: parents[name] for name in kept}
    parents[role] = other
  check_rewards(run, config)
  folders = {role: str(run.source) for role, run in parents.items()}
  return config.with_inits(folders), parents


def asked_config(run: Run) -> ExperimentConfig:
  """The config whose questions are asked: the run's own, or that of --config for a --model."""
  if not isinstance(run, HfFolder):
    if CONFIG.value is not None:
      raise UserError('--config: a run is asked its own questions; give it with --model.')
    return run.config
  if CONFIG.value is None:
    raise UserError('--model: name the stage whose questions it is asked with --config.')
  config = cli.given(CONFIG)
  if not isinstance(config, ExperimentConfig):
    raise UserError(f'--config: expected an ExperimentConfig, got {type(config).__name__}.')
  objective = objective_of(config.objective)
  trained = objective_of(run.config.objective).trains
  if objective.trains != trained:
    raise UserError(
      f'--config: {objective.name} trains a {objective.trains.replace("_", " ")}, and {run.source} '
      f'is a {trained.replace("_", " ")}.'
    )
  if objective.reference(config.objective) and REFERENCE.value is None:
    raise UserError(f'--config: {objective.name} measures against a --reference; name one.')
  # The folder is in the place of what the stage would train, and flags name whom it starts from.
  policy = dataclasses.replace(config.policy, init=REFERENCE.value or str(run.source))
  judge = REWARD_MODEL.value or config.reward_model.init
  reward_model = dataclasses.replace(config.reward_model, init=judge)
  dataclasses.replace(config, policy=policy, reward_model=reward_model).validate()
  return config


def check_rewards(run: Run, config: ExperimentConfig) -> None:
  """Raises UserError where functions that paid the run are gone, RunError where they changed."""
  online = objective_of(config.objective).data == 'prompts'
  if isinstance(run, HfFolder) or not (config.evaluation.prompts and online):
    return
  for reward in config.rollout.rewards:
    file = pathlib.Path(reward.source.rpartition(':')[0])
    if file.suffix and file.resolve().is_relative_to(run.folder.resolve()):
      raise RunError(
        f'{run.source}: it names {reward.source}, a program in its own folder. A run directory is '
        'data, and nothing in it is run. Ask for no answers with --prompts=0.'
      )
  was = run.reward_fingerprints
  changed = [name for name, sha in reward_fingerprints(config.rollout).items() if was[name] != sha]
  if changed:
    raise RunError(
      f'{run.source}: {changed[0]} is not as it was when it paid the run: what it pays now is '
      'another reward. Restore the file, or ask for no answers with --prompts=0.'
    )


def load_data(run: Run, config: ExperimentConfig) -> Feedback | ControlFeedback:
  """The records of the run; raises RunError for others."""
  # Bad records that are set aside go beside runs; beside a folder, of the hub maybe, they do not.
  of_hf = isinstance(run, HfFolder)
  root = pathlib.Path(JSON.value or '.').parent if of_hf else run.folder.parent
  feedback = reading.load_data(config.data, root)
  if not of_hf and feedback.fingerprint != run.data_fingerprint:
    raise RunError(
      f'{run.source}: {feedback.source} holds other records than the run learnt from: what it saw '
      'in training might now be held out. Name the same file with --data_path.'
    )
  return feedback


def print_table(run: Run, config: ExperimentConfig, metrics: Mapping[str, Measured]) -> None:
  """The numbers, for the terminal."""
  print(
    f'{run.source}: {objective_of(config.objective).name}, {CHECKPOINT.value} parameters, '
    f'step {run.step(CHECKPOINT.value)}'
  )
  width = max(map(len, metrics))
  print(f'{"":{width}}  {"mean":>9}  {"95% interval":^21}  {"count":>6}')
  for name, (mean, interval, count) in metrics.items():
    ends = '' if interval is None else f'{interval.low:9.4g} .. {interval.high:<9.4g}'
    print(f'{name:{width}}  {mean:9.4g}  {ends:^21}  {"" if count is None else count:>6}')


def to_json(
  run: Run, config: ExperimentConfig, parents: Mapping[str, Run], metrics: Mapping[str, Measured]
) -> dict[str, Any]:
  """What --json writes; the schema is in the program's description."""
  folders = {role: str(parent.source) for role, parent in parents.items()}
  asked = config.evaluation
  return {
    'schema': 1,
    'run': str(run.source),
    'name': config.name,
    'objective': objective_of(config.objective).name,
    'checkpoint': CHECKPOINT.value,
    'step': run.step(CHECKPOINT.value),
    'params_sha256': run.params_sha256,
    'reference': folders.get('policy'),
    'reward_model': folders.get('reward_model'),
    'data_fingerprint': None if isinstance(run, HfFolder) else run.data_fingerprint,
    'evaluation': {
      'prompts': asked.prompts,
      'records': asked.records,
      'batch_size': asked.batch_size,
      'seed': asked.seed,
    },
    'metrics': {
      name: {
        'mean': mean,
        'low': None if interval is None else interval.low,
        'high': None if interval is None else interval.high,
        'count': count,
      }
      for name, (mean, interval, count) in metrics.items()
    },
  }


if __name__ == '__main__':
  cli.run(cluster.joined(main))
