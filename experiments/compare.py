"""Compares objectives from one start, on the same preferences, by one command.

  python -m experiments.compare --config=configs/quickstart.py --workdir=runs/quickstart

A study trains the SFT start and the reward model once, then every objective with every seed,
measures each along its run on the same held-out prompts, and writes summary.json, report.md and
report.html into --workdir: each objective's reward-KL curve beside the best any policy can have.

Any field can be set: --config.objectives.dpo.objective.beta=0.3 --config.seeds=0,1,2,3,4. The same
command again goes on where it was interrupted; finished stages are not run again.

Exit codes: 0 done, 1 something given is wrong (one message says what), 75 stopped by SIGTERM or
Ctrl-C with its state saved: run the same command again to go on.
"""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli, cluster
from experiments.reporting import evaluations as evaluations_lib
from experiments.reporting import tables
from experiments.reporting.files import write_report
from experiments.reporting.summary import Completion, Study, summarise
from rlhf_jax.common import files, processes
from rlhf_jax.common.errors import ConfigError, RunError, UserError
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.config_values import to_dict
from rlhf_jax.evaluation import stored
from rlhf_jax.evaluation.frontier import FrontierPoint, optimal_frontier
from rlhf_jax.evaluation.statistics import proportion_interval
from rlhf_jax.feedback.dataset import Feedback
from rlhf_jax.objectives import objective_of
from rlhf_jax.reading import load_data
from rlhf_jax.recipes.parts import load_parts
from rlhf_jax.recipes.probes import reference_rewards
from rlhf_jax.runs import Run, fingerprint
from rlhf_jax.stages import StoppedError, check_alone, run_stage
from rlhf_jax.study import StudyConfig
from rlhf_jax.training.writers import read_rows

CONFIG = cli.define_config(
  'The study: a file that defines get_config(), such as configs/quickstart.py.'
)
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'The folder of the study; made when it does not exist.', required=True
)
OVERWRITE = flags.DEFINE_bool(
  'overwrite', False, 'Start stages over whose folder holds a run of another config.'
)

# The array of a frontier's file.
_REWARDS = 'rewards'
# Samples shown in the report.
_SHOWN_PROMPTS = 4


@dataclasses.dataclass(frozen=True)
class Stages:
  """The finished runs of a study."""

  sft: Run
  reward_model: Run
  objectives: Mapping[tuple[str, int], Run]


def run_stages(study: StudyConfig, folder: pathlib.Path, overwrite: bool) -> Stages:
  """Runs what is not finished. Raises StoppedError when a signal ends a stage early."""
  total = 2 + len(study.objectives) * len(study.seeds)
  done = 0

  def run(config: ExperimentConfig, name: str) -> Run:
    nonlocal done
    done += 1
    processes.say(f'[{done}/{total}] {name}')
    outcome = run_stage(config, folder / name, root=folder, overwrite=overwrite)
    if outcome.stopped:
      raise StoppedError
    return outcome.run

  sft = run(study.sft, 'sft')
  start = dataclasses.replace(study.reward_model.policy, init=str(sft.folder))
  reward_model = run(dataclasses.replace(study.reward_model, policy=start), 'reward_model')
  objectives = {}
  for seed in study.seeds:
    for name in study.objectives:
      config = study.stage(name, seed, str(sft.folder), str(reward_model.folder))
      objectives[name, seed] = run(config, f'{name}_seed{seed}')
  return Stages(sft, reward_model, objectives)


def check_stages(study: StudyConfig, folder: pathlib.Path) -> None:
  """Raises UserError for what can be known to be wrong of any stage before the first is trained."""
  for name, config in study.stages().items():
    try:
      check_alone(config, folder)
    except ConfigError as error:
      raise ConfigError.within(name, error) from error


def read_evaluations(stages: Stages) -> Iterator[dict[str, Any]]:
  """What the runs' evaluations measured, prompt by prompt; SFT is every run's step 0."""
  for number, ((objective, seed), run) in enumerate(stages.objectives.items()):
    for row in read_rows(run.folder / 'evaluations.jsonl'):
      # The start is paid by nobody.
      names = evaluations_lib.METRICS + (evaluations_lib.OPTIONAL if row['step'] else ())
      measured = evaluations_lib.measured(run.answers(row['step']), names)
      if row['step']:
        yield {
          'objective': objective,
          'seed': seed,
          'step': row['step'],
          'tokens': row['tokens'],
          'seconds': row['seconds'],
          **measured,
        }
      elif number == 0:
        result = stages.sft.require_result()
        yield {
          'objective': 'sft',
          'seed': stages.sft.config.seed,
          'step': result['step'],
          'tokens': result['tokens'],
          'seconds': result['seconds'],
          **measured,
        }


def read_health(stages: Stages) -> list[dict[str, Any]]:
  """What the runs' monitors said while they trained."""
  runs = {('sft', stages.sft.config.seed): stages.sft, **stages.objectives}
  return [
    {'objective': objective, 'seed': seed, **row}
    for (objective, seed), run in runs.items()
    for row in read_rows(run.folder / 'health.jsonl')
  ]


def frontier(study: StudyConfig, stages: Stages, folder: pathlib.Path) -> list[FrontierPoint]:
  """The optimal frontier of the SFT policy; the sampled rewards are kept for the next time."""
  if not study.frontier_samples:
    return []
  (name, seed), _ = next(iter(stages.objectives.items()))
  config = study.stage(name, seed, str(stages.sft.folder), str(stages.reward_model.folder))
  made_from = {
    'sft': stages.sft.params_identity(config.policy.checkpoint),
    'samples': study.frontier_samples,
    **{part: to_dict(getattr(config, part)) for part in ('data', 'generation', 'evaluation')},
  }
  path = folder / 'frontier' / f'{fingerprint(made_from)[:16]}.npz'
  if not processes.on_main(lambda: kept(path)):
    processes.say(f'optimal frontier: {study.frontier_samples} responses of SFT to each prompt')
    feedback = load_data(config.data, folder)
    assert isinstance(feedback, Feedback), 'a study is of texts'
    parts = load_parts(config, {'policy': stages.sft}, feedback)
    with jax.set_mesh(parts.mesh):
      rewards = reference_rewards(parts, study.frontier_samples)
    processes.on_main(lambda: keep(rewards, path))
  return optimal_frontier(stored.read(path)[_REWARDS]) if processes.is_main() else []


def kept(path: pathlib.Path) -> bool:
  """Whether there is an array that `keep` wrote; one that is damaged is made again."""
  if not path.exists():
    return False
  try:
    if _REWARDS in stored.read(path):
      return True
    print(f'{path}: damaged (it has no {_REWARDS}); made again', flush=True)
  except RunError as error:
    print(f'{error} It is made again.', flush=True)
  return False


def keep(rewards: np.ndarray, path: pathlib.Path) -> None:
  """Writes an array that is either whole or absent."""
  path.parent.mkdir(exist_ok=True)
  files.write_arrays(path, {_REWARDS: rewards})


def reward_model_facts(run: Run, folder: pathlib.Path) -> dict[str, Any]:
  """Held-out accuracy with its interval, beside the best that any judge could have."""
  row = read_rows(run.folder / 'evaluations.jsonl')[-1]
  feedback = load_data(run.config.data, folder)
  assert isinstance(feedback, Feedback), 'a study is of texts'
  right = run.answers(row['step'])['held_out_right']
  return {
    'accuracy': row['held_out_accuracy'],
    'accuracy_interval': proportion_interval(right[None]).to_dict(),
    'bayes_accuracy': feedback.bayes_accuracy(right.size),
  }


def completions(stages: Stages) -> Iterator[Completion]:
  """The first prompts' responses, before and after, of each objective's first seed."""
  shown: dict[str, tuple[Run, int]] = {}
  for (objective, _), run in stages.objectives.items():
    shown.setdefault('sft', (run, 0))
    shown.setdefault(objective, (run, run.config.steps))
  for number in range(_SHOWN_PROMPTS):
    for objective, (run, step) in shown.items():
      arrays = run.answers(step)
      if number < len(arrays['prompt']):
        yield Completion(
          prompt=str(arrays['prompt'][number]),
          objective=objective,
          response=str(arrays['response'][number]),
          gold_reward=float(arrays['gold_reward'][number]),
        )


def read_record(run: Run) -> dict[str, Any]:
  """What a run's result depends on beside its config; runs of older versions say less of it."""
  record = json.loads((run.folder / 'record.json').read_text(encoding='utf-8'))
  return {'quarantined_records': 0, 'damaged_sources': [], **record}


def describe(study: StudyConfig, stages: Stages) -> Study:
  """What a reader must know beside the numbers."""
  config = next(iter(study.objectives.values()))
  first = next(iter(stages.objectives.values()))
  answered = len(first.answers(first.config.steps)['prompt'])
  record = read_record(stages.sft)
  packages = record['packages']
  runs = (stages.sft, stages.reward_model, *stages.objectives.values())
  records = [read_record(run) for run in runs]
  reward_cost = stages.reward_model.require_result()
  return Study(
    title=study.name,
    command=f'python -m experiments.compare {" ".join(sys.argv[1:])}',
    matched=[
      (
        'Start',
        f'one SFT policy (parameters {stages.sft.params_sha256[:12]}), also the reference of '
        'every KL',
      ),
      (
        'Preferences',
        f'{config.data.source}, data {record["data_fingerprint"][:12]}, the same for the reward '
        'model and all objectives, of which each learns from its kind: '
        + '; '.join(
          f'{name} from {objective_of(stage.objective).data.replace("_", " ")}'
          for name, stage in study.objectives.items()
        ),
      ),
      (
        'Evaluation',
        f'{answered} held-out prompts, one response each, the same '
        'random numbers for every model; temperature '
        f'{config.generation.temperature:g}, at most {config.data.response_length} tokens',
      ),
      (
        'Cost',
        "tokens and seconds are each objective's own training, without SFT; samples count once, "
        'however many epochs read them, and objectives that sample also need '
        f'the reward model: {reward_cost["tokens"]:,} tokens, {reward_cost["seconds"]:.0f} s',
      ),
    ],
    environment=[
      ('rlhf_jax', f'{record["rlhf_jax"]}, revision {record["git_revision"]}'),
      ('Packages', ', '.join(f'{name} {packages[name]}' for name in ('jax', 'flax', 'optax'))),
      ('Python', record['python']),
      ('Devices', f'{len(record["devices"])} x {record["devices"][0]} ({record["backend"]})'),
    ],
    kl_budget=study.kl_budget if study.kl_budget > 0 else None,
    # They read the same files, which each of them may use in part.
    quarantined=max(record['quarantined_records'] for record in records),
    damage=list(dict.fromkeys(said for record in records for said in record['damaged_sources'])),
  )


def compare(
  study: StudyConfig, folder: pathlib.Path, overwrite: bool = False
) -> dict[str, Any] | None:
  """Runs what is not finished of a study, writes its report into `folder`, returns its summary.

  Of several processes, only the first does so; the others return None.

  Raises:
    UserError: something in the study's configs, data or run directories cannot work.
    StoppedError: a signal ended a stage early; the same call goes on.
  """
  study.validate()
  check_stages(study, folder)
  stages = run_stages(study, folder, overwrite)
  optimum = frontier(study, stages, folder)
  if not processes.is_main():
    return None
  summary = summarise(
    list(read_evaluations(stages)),
    optimum=optimum,
    reward_model=reward_model_facts(stages.reward_model, folder),
    study=describe(study, stages),
    completions=list(completions(stages)),
    health=read_health(stages),
  )
  write_report(summary, folder)
  return summary


def main() -> int:
  study = cli.given(CONFIG)
  if not isinstance(study, StudyConfig):
    raise UserError(
      f'--config: expected a StudyConfig from get_config(), got {type(study).__name__}. '
      'A single stage is run by experiments.train.'
    )
  began = time.monotonic()
  folder = pathlib.Path(WORKDIR.value)
  summary = compare(study, folder, OVERWRITE.value)
  if summary is None:
    return cli.DONE
  print_summary(summary)
  seconds = time.monotonic() - began
  print(f'{study.name}: done in {seconds:.0f} s, {folder / "report.html"}')
  return cli.DONE


def print_summary(summary: Mapping[str, Any]) -> None:
  """The final table and the findings, for the terminal."""
  table = tables.final_table(summary, pooled=True)
  rows = [table.header, *table.rows]
  widths = [max(len(str(row[column])) for row in rows) for column in range(len(table.header))]
  for row in rows:
    print('  '.join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)))
  for finding in summary['findings']:
    print(f'finding: {finding}')


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  cli.run(cluster.joined(main, resumable=True), resumable=True)
