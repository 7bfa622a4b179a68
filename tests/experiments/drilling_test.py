"""What drills hold against the undisturbed run: every difference but wall time is told."""

import json
import pathlib
import random
import shutil

import numpy as np
import pytest

from experiments.drilling.bits import differences
from experiments.drilling.ground import Ground
from experiments.drilling.program import Program

MATCHED = [['Start', 'one SFT policy'], ['Cost', 'the reward model: 1,024 tokens, 13 s']]


def finished(folder: pathlib.Path, seconds: int = 13) -> pathlib.Path:
  """A study of one run that took so long."""
  run = folder / 'dpo_seed0'
  (run / 'evaluations').mkdir(parents=True)
  rows = [{'step': step, 'loss': 0.5, 'seconds': seconds} for step in (1, 2)]
  (run / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  result = {'params_sha256': 'ab', 'metrics': rows[-1]}
  (run / 'result.json').write_text(json.dumps(result))
  np.savez(run / 'evaluations' / '00000002.npz', kl=np.array([0.5, np.nan]), prompt=['a', 'b'])
  matched = json.loads(json.dumps(MATCHED).replace('13 s', f'{seconds} s'))
  study = {'command': f'compare --workdir={folder}', 'matched': matched}
  (folder / 'summary.json').write_text(json.dumps({'study': study, 'rows': rows}))
  return folder


def test_another_folder_and_another_time_are_the_same(tmp_path: pathlib.Path) -> None:
  assert differences(finished(tmp_path / 'a'), finished(tmp_path / 'b', seconds=7)) == []


@pytest.mark.parametrize(
  ('file', 'old', 'new', 'said'),
  [
    ('dpo_seed0/metrics.jsonl', '0.5', '0.25', 'row 1 differs: loss is 0.25, not 0.5'),
    ('dpo_seed0/metrics.jsonl', '{"step": 1', '{"step": 1}\n{"step": 1', '3 rows, not 2'),
    ('dpo_seed0/result.json', 'ab', 'ac', "params_sha256 is 'ac', not 'ab'"),
    ('summary.json', 'one SFT policy', 'another', 'study.matched is '),
    ('summary.json', '"step": 2', '"step": 3', 'rows[1].step is 3, not 2'),
  ],
)
def test_every_difference_is_told(
  file: str, old: str, new: str, said: str, tmp_path: pathlib.Path
) -> None:
  expected, found = finished(tmp_path / 'a'), finished(tmp_path / 'b')
  path = found / file
  path.write_text(path.read_text().replace(old, new, 1))
  (line,) = differences(found, expected)
  assert line.startswith(f'{file}: ') and said in line


def test_answers_are_compared_and_whole_runs_counted(tmp_path: pathlib.Path) -> None:
  expected, found = finished(tmp_path / 'a'), finished(tmp_path / 'b')
  np.savez(found / 'dpo_seed0' / 'evaluations' / '00000002.npz', kl=np.ones(2), prompt=['a', 'b'])
  assert differences(found, expected) == ['dpo_seed0/evaluations/00000002.npz: kl differs']
  shutil.copytree(expected / 'dpo_seed0', found / 'dpo_seed1')
  shutil.rmtree(found / 'dpo_seed0')
  lines = differences(found, expected)
  assert 'dpo_seed0/result.json: missing' in lines
  assert lines[-1] == 'dpo_seed1/result.json: not expected'


def test_steps_that_no_checkpoint_has_are_lost(tmp_path: pathlib.Path) -> None:
  run = tmp_path / 'dpo_seed0'
  (run / 'checkpoints' / '4').mkdir(parents=True)
  (run / 'checkpoints' / '6.orbax-checkpoint-tmp').mkdir()
  ground = Ground(Program('train', ()), tmp_path, tmp_path, 1.0, random.Random(0))
  assert ground.lost(tmp_path) == '', 'nothing was told of'
  (run / 'metrics.jsonl').write_text('{"step": 4}\n')
  assert ground.lost(tmp_path) == ''
  (run / 'metrics.jsonl').write_text('{"step": 4}\n{"step": 6}\n')
  assert ground.lost(tmp_path) == 'dpo_seed0 has rows to step 6 and checkpoints [4]'
  (run / 'result.json').write_text('{}')
  assert ground.lost(tmp_path) == '', 'it is finished'
