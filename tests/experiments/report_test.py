"""Reports are made from the summary alone, by call and by program."""

import json
import subprocess
import sys

import pytest

from experiments.reporting import files
from rlhf_jax.common.errors import DataError


def estimate(mean):
  return {'mean': mean, 'low': mean - 0.1, 'high': mean + 0.1}


@pytest.fixture
def summary():
  metrics = ('gold_reward', 'proxy_reward', 'kl', 'win_rate', 'length')
  rows = [
    {
      'objective': objective,
      'seed': seed,
      'step': 5,
      'tokens': 100,
      'seconds': 1.5,
      **{metric: estimate(0.5) for metric in metrics},
    }
    for objective in ('sft', 'dpo')
    for seed in (0, None)
  ]
  return {
    'schema': 1,
    'rows': rows,
    'optimum': [{'kl': kl, 'gold_reward': estimate(1 + kl)} for kl in (0.0, 1.0)],
    'reward_model': {'accuracy': 0.8, 'bayes_accuracy': 0.82},
    'findings': [],
  }


def test_a_report_made_again_from_its_summary_is_the_same(summary, tmp_path):
  files.write_report(summary, tmp_path)
  names = ['report.html', 'report.md', 'summary.json']
  assert sorted(path.name for path in tmp_path.iterdir()) == names
  read = files.read_summary(tmp_path / 'summary.json')
  assert read == summary
  files.write_report(read, tmp_path / 'again')
  for name in names:
    assert (tmp_path / 'again' / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_bad_summary_is_refused_before_anything_is_written(summary, tmp_path):
  del summary['findings']
  with pytest.raises(DataError, match='findings'):
    files.write_report(summary, tmp_path / 'new')
  assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize(
  ('content', 'message'), [('{', 'expected JSON'), ('{}', 'schema'), (None, 'No such file')]
)
def test_a_bad_file_is_named(content, message, tmp_path):
  path = tmp_path / 'summary.json'
  if content is not None:
    path.write_text(content)
  with pytest.raises(DataError, match=f'summary.json: .*{message}'):
    files.read_summary(path)


def test_the_program_writes_beside_the_summary_and_exits_1_on_what_the_user_gave(summary, tmp_path):
  def run(path):
    command = [sys.executable, '-m', 'experiments.report', f'--summary={path}']
    return subprocess.run(command, capture_output=True, text=True, check=False)

  path = tmp_path / 'summary.json'
  path.write_text(json.dumps(summary))
  done = run(path)
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'report.html').exists() and (tmp_path / 'report.md').exists()
  failed = run(tmp_path / 'nowhere.json')
  assert failed.returncode == 1
  assert 'nowhere.json' in failed.stderr and 'Traceback' not in failed.stderr
