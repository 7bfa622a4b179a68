"""The bag-of-words baseline on comparisons whose answer is known, run as a user runs it."""

import json
import pathlib
import random
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_one_telling_word_is_found_and_one_that_is_cut_off_is_not(tmp_path: pathlib.Path) -> None:
  """The chosen response ends in 'splendid', the rejected one in 'bad'; before that they agree.

  Whole responses tell them apart always. Of bytes without merges 8 are 'abcd efg', the same in
  both: a tie, half right. The chosen one is always the longer.
  """
  draw = random.Random(0)
  words = [''.join(draw.choices('pqrstuvw', k=3)) for _ in range(40)]
  with (tmp_path / 'pairs.jsonl').open('w') as file:
    for number in range(60):
      start = f'abcd efg {draw.choice(words)} {draw.choice(words)}'
      pair = {
        'prompt': f'prompt {number}',
        'chosen': f'{start} splendid',
        'rejected': f'{start} bad',
      }
      file.write(json.dumps(pair) + '\n')
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'benchmarks.bag_of_words',
      '--config=configs/reward_model.py',
      '--config.data.source=jsonl',
      f'--config.data.path={tmp_path / "pairs.jsonl"}',
      '--config.data.held_out=20',
      '--config.data.tokenizer=byte',
      '--config.data.vocab_size=260',
      '--config.data.response_length=8',
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  first, *rows = done.stdout.splitlines()
  assert first == '40 comparisons to learn from, 20 held out'
  found = {
    name.strip(): float(mean) for name, mean in re.findall(r'(.+?) +(\d\.\d+)  \[', done.stdout)
  }
  assert len(rows) == len(found) == 4
  assert found == {
    'whole responses': 1.0,
    'their first 8 tokens': 0.5,
    'the longer is preferred': 1.0,
    'the shorter is preferred': 0.0,
  }
