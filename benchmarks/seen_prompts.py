"""How far from the optimum is a study on prompts that it was trained on, and on others?

  python -m experiments.compare --config=configs/known_optimum.py:distilled --workdir=runs/distilled
  python -m benchmarks.seen_prompts --study=runs/distilled

The prompts of evaluations are fresh draws; short ones are often among those of training too. For
either kind and the last step of every objective it prints gold reward and KL with their 95%
intervals over seeds and prompts, the optimum at that KL over the very same prompts, and the share
of the possible gain.
"""

import pathlib
from typing import NamedTuple

import numpy as np
from absl import flags

from experiments import cli
from experiments.reporting import text
from rlhf_jax.common.errors import UserError
from rlhf_jax.evaluation.frontier import frontier_at, optimal_frontier
from rlhf_jax.evaluation.statistics import Interval, pooled_interval
from rlhf_jax.feedback.dataset import Feedback
from rlhf_jax.objectives import objective_of
from rlhf_jax.reading import load_data
from rlhf_jax.runs import Run
from rlhf_jax.training.writers import read_rows

STUDY = flags.DEFINE_string('study', None, 'The folder of a finished study.', required=True)


class Row(NamedTuple):
  """One objective on one kind of prompts.

  Attributes:
    prompts: how many.
    gold: gold reward; kl: nats a sequence.
    optimum: at that KL.
    share: the gain over the start as a part of the optimum's.
  """

  prompts: int
  gold: Interval
  kl: Interval
  optimum: Interval
  share: float


def measure(gold: np.ndarray, kl: np.ndarray, start: np.ndarray) -> Row:
  """`[S, P]` of S seeds on P prompts, and `[P, N]` gold rewards of the start's samples to them."""
  frontier = optimal_frontier(start)
  reward, spent = pooled_interval(gold), pooled_interval(kl)
  best = frontier_at(frontier, spent.mean)
  first = float(start.mean())
  share = (reward.mean - first) / (best.mean - first)
  return Row(gold.shape[1], reward, spent, best, share)


def trained_prompts(run: Run, folder: pathlib.Path) -> set[str]:
  """The prompts that an objective had records of, or answered."""
  config = run.config
  feedback = load_data(config.data, folder)
  assert isinstance(feedback, Feedback), 'a study is of texts'
  kind = objective_of(config.objective).data
  records = feedback.require('train', kind)
  return {record.text if kind == 'prompts' else record.prompt for record in records}


def read(folder: pathlib.Path) -> dict[str, list[Run]]:
  """The study's finished runs by objective."""
  runs: dict[str, list[Run]] = {}
  for path in sorted(folder.glob('*_seed*/result.json')):
    runs.setdefault(path.parent.name.rpartition('_seed')[0], []).append(Run(path.parent))
  if not runs:
    raise UserError(f'--study={folder}: no finished runs of objectives in it.')
  return runs


def rows_of(runs: list[Run], start: np.ndarray, folder: pathlib.Path) -> dict[str, Row]:
  """An objective's last evaluations, on prompts it was trained on and on others."""
  columns = []
  for run in runs:
    step = read_rows(run.folder / 'evaluations.jsonl')[-1]['step']
    arrays = run.answers(step)
    columns.append({name: arrays[name] for name in ('prompt', 'gold_reward', 'kl')})
  known = trained_prompts(runs[0], folder)
  seen = np.array([prompt in known for prompt in columns[0]['prompt'].tolist()])
  gold, kl = (np.stack([column[name] for column in columns]) for name in ('gold_reward', 'kl'))
  kinds = {'seen': seen, 'unseen': ~seen, 'all': np.ones(len(seen), bool)}
  return {
    kind: measure(gold[:, rows], kl[:, rows], start[rows])
    for kind, rows in kinds.items()
    if rows.sum() > 1
  }


def main() -> int:
  folder = pathlib.Path(STUDY.value)
  samples = sorted((folder / 'frontier').glob('*.npy'))
  if len(samples) != 1:
    raise UserError(f'--study={folder}: expected one file in frontier/, found {len(samples)}.')
  start = np.load(samples[0], allow_pickle=False)
  print('| Objective | Prompts | Number | Gold reward | KL (nats) | Optimum | Share |')
  print('| :-- | :-- | --: | --: | --: | --: | --: |')
  for name, runs in read(folder).items():
    for kind, row in rows_of(runs, start, folder).items():
      cells = [str(row.prompts), *(text.interval(x.to_dict()) for x in row[1:4])]
      print(f'| {name} | {kind} | {" | ".join(cells)} | {row.share:.0%} |')
  return cli.DONE


if __name__ == '__main__':
  cli.run(main)
