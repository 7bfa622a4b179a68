"""The programs of benchmarks, run as a user runs them."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def program(*arguments: object) -> subprocess.CompletedProcess[str]:
  command = [sys.executable, '-m', *map(str, arguments)]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_a_job_is_timed_and_profiled(tmp_path: pathlib.Path) -> None:
  found = program(
    *('tests.benchmarks.tiny_program', 'benchmarks.run', '--job=ppo_iteration', '--repeats=1'),
    *(f'--json={tmp_path / "numbers.json"}', f'--profile={tmp_path / "trace"}'),
  )
  assert found.returncode == 0, found.stderr
  lines = found.stdout.splitlines()
  for start in ('ppo_iteration SMALL: step ', 'loaded in ', 'rollout ', 'memory, GB: host '):
    assert any(line.startswith(start) for line in lines), start
  costliest = next(number for number, line in enumerate(lines) if line.startswith('costliest'))
  assert ' jit_' in lines[costliest + 1]
  assert list((tmp_path / 'trace').rglob('*.xplane.pb'))
  numbers = json.loads((tmp_path / 'numbers.json').read_text())
  assert numbers['job'] == 'ppo_iteration' and numbers['dtype'] == 'float32'
  assert 'load_before' not in numbers and len(numbers['operations']) == 15


@pytest.mark.slow
def test_jobs_without_steps_have_no_profile(tmp_path: pathlib.Path) -> None:
  found = program('benchmarks.run', '--job=load_export', f'--profile={tmp_path}')
  assert found.returncode == 1 and 'expected none with --job=load_export' in found.stderr


@pytest.mark.slow
@pytest.mark.skipif('cpu' not in os.environ['JAX_PLATFORMS'], reason='has an accelerator')
@pytest.mark.parametrize('name', ['run', 'table', 'alternate'])
def test_a_large_size_is_skipped_on_a_processor(name: str, tmp_path: pathlib.Path) -> None:
  page = tmp_path / 'page.md'
  page.write_text('<!-- 1B -->\nold\n<!-- end -->\n')
  own = {
    'run': ['--job=decode'],
    'table': [f'--out={page}', f'--folder={tmp_path / "numbers"}'],
    'alternate': ['--way=pack'],
  }[name]
  found = program(f'benchmarks.{name}', '--size=1B', *own)
  assert found.returncode == 0, found.stderr
  assert found.stdout.startswith('--size=1B: skipped, it needs an accelerator')
  assert 'old' in page.read_text() and os.listdir(tmp_path) == ['page.md']


@pytest.mark.slow
def test_a_table_is_written_of_new_and_of_kept_numbers(tmp_path: pathlib.Path) -> None:
  """Those of sft are there, and stay; load_export is run in the type that is asked for."""
  page = tmp_path / 'page.md'
  page.write_text('before\n<!-- SMALL -->\n<!-- end -->\nafter\n')
  kept = tmp_path / 'numbers' / 'SMALL' / 'against_nobody_bfloat16'
  kept.mkdir(parents=True)
  row = {'median': 2.0, 'least': 1.0, 'most': 3.0}
  sft = {
    **dict(job='sft', dtype='bfloat16', device='abacus', devices=1, processor='beads', cores=2),
    **dict(jax='0.1', revision='abc', others=None, peer=None, peak_bytes={'host': 10**9}),
    'seconds': {'step': {'ours': row}},
  }
  (kept / 'sft.json').write_text(json.dumps(sft))
  asked = ('benchmarks.table', '--size=SMALL', '--dtype=bfloat16', '--repeats=1')
  where = (f'--folder={tmp_path / "numbers"}', f'--out={page}')
  found = program(*asked, '--jobs=sft,load_export', *where)
  assert found.returncode == 0, found.stderr
  text = page.read_text()
  assert text.startswith('before\n') and text.endswith('after\n') and ' in bfloat16; ' in text
  assert '| sft | step | 2.000 (1.000 to 3.000) |' in text and '| load_export | export |' in text
  measured = json.loads((kept / 'load_export.json').read_text())
  assert measured['dtype'] == 'bfloat16' and measured['bytes'] == pytest.approx(2 * 4.2e6, rel=0.05)


@pytest.mark.slow
def test_jobs_that_there_are_not_are_refused(tmp_path: pathlib.Path) -> None:
  found = program('benchmarks.table', '--jobs=sft,tea', f'--folder={tmp_path}')
  assert found.returncode == 1 and '--jobs=tea: expected some of sft, ' in found.stderr
  assert not os.listdir(tmp_path)
