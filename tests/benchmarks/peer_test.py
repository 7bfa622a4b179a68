"""A peer does its steps in turn with ours; what is wrong with one is said."""

import ast
import importlib.util
import io
import json
import os
import pathlib
import subprocess
import sys
from types import ModuleType

import pytest

from benchmarks import measuring, peer, startup, timing, workloads
from benchmarks.peers import conductor as conducting
from benchmarks.peers import trl_jobs, tunix_jobs
from rlhf_jax.common.errors import UserError

FAKE = pathlib.Path(__file__).parent / 'fake_peer.py'
TRL, TUNIX = peer.LIBRARIES['trl'], peer.LIBRARIES['tunix']
ROOT = pathlib.Path(__file__).resolve().parents[2]


def fake(log: pathlib.Path, *arguments: object) -> peer.Peer:
  return peer.Peer([sys.executable, str(FAKE), str(log), *map(str, arguments)], 'fake')


def test_steps_are_done_in_turn_and_compared_in_pairs(tmp_path: pathlib.Path) -> None:
  """Our steps take 1, 2 and 4 s after a first of 9, the peer's always 2: 2, 1 and 0.5 times."""
  log, ours = tmp_path / 'log', iter([9.0, 1.0, 2.0, 4.0])

  def step() -> dict[str, float]:
    with log.open('a') as file:
      file.write('ours\n')
    return {'step': next(ours)}

  found = peer.contest(step, lambda: fake(log, 2.0), 3)
  assert log.read_text().split() == ['ours', 'peer'] * 4
  assert found.first == {'step': 9.0}
  row = found.numbers()['seconds']['step']
  assert row['ours'] == {'median': 2.0, 'least': 1.0, 'most': 4.0, 'all': [1.0, 2.0, 4.0]}
  assert row['peer']['all'] == [2.0, 2.0, 2.0]
  assert row['ratio'] == {'median': 1.0, 'least': 0.5, 'most': 2.0}
  assert found.peer is not None and found.peer['loaded']['versions']['trl'] == '1.2'
  if pathlib.Path('/proc/self/status').exists():
    assert found.peer['peak_bytes'] > 2**20
    assert found.numbers()['peak_bytes']['host'] > found.peer['peak_bytes']


def test_a_peer_that_ends_in_the_middle_is_quoted(tmp_path: pathlib.Path) -> None:
  with pytest.raises(UserError, match='fake: it ended with code 1 in the middle') as raised:
    peer.contest(lambda: {'step': 1.0}, lambda: fake(tmp_path / 'log', 2.0, 2), 5)
  lines = str(raised.value).splitlines()
  assert lines[1] == 'line 85' and lines[-1] == 'line 99'


def test_a_peer_that_ends_before_it_is_told_anything_is_quoted() -> None:
  started = peer.Peer([sys.executable, '-c', 'raise SystemExit("no luck")'], 'fake')
  with started, pytest.raises(UserError, match='it ended with code 1.*\n.*no luck'):
    started.loaded()


def test_what_is_no_answer_is_quoted() -> None:
  with (
    peer.Peer([sys.executable, '-c', 'print("hello")'], 'fake') as started,
    pytest.raises(UserError, match="expected a line of JSON, it said 'hello"),
  ):
    started.loaded()


def test_a_peer_that_is_not_there_is_explained(tmp_path: pathlib.Path) -> None:
  with pytest.raises(UserError, match='no such program.*python -m venv.*pip install'):
    TRL.check(str(tmp_path / 'python'), 'sft')
  program = tmp_path / 'program'
  program.write_text('#!/bin/sh\necho out of order >&2\n')
  program.chmod(0o755)
  with pytest.raises(UserError, match='not a Python that works .out of order'):
    TRL.check(str(program), 'sft')


@pytest.mark.skipif(importlib.util.find_spec('trl') is not None, reason='TRL is installed here')
def test_packages_that_the_peer_lacks_are_named() -> None:
  with pytest.raises(UserError, match=r'it lacks .*trl.*\.venv-trl/bin/pip install'):
    TRL.check(sys.executable, 'sft')
  with pytest.raises(UserError, match=r'\.venv-trl-ppo/bin/pip install'):
    TRL.check(sys.executable, 'ppo_iteration')


@pytest.mark.skipif(importlib.util.find_spec('tunix') is not None, reason='Tunix is installed here')
def test_what_a_library_lacks_is_named() -> None:
  with pytest.raises(UserError, match=r'--job=reward: Tunix has none like it'):
    TUNIX.check(sys.executable, 'reward')
  with pytest.raises(UserError, match=r"it lacks tunix\. .*pip install 'google-tunix=="):
    TUNIX.check(sys.executable, 'sft')


@pytest.mark.slow
def test_flags_of_the_peer_belong_together() -> None:
  """Nothing is loaded before they are found wrong."""
  command = [sys.executable, '-m', 'benchmarks.run', '--job=sft', '--peer=trl']
  found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert found.returncode == 1 and 'give both, or neither' in found.stderr


@pytest.mark.parametrize('program', [trl_jobs, tunix_jobs, conducting])
def test_the_peer_imports_nothing_of_ours(program: ModuleType) -> None:
  """And what its environment alone has only when it is given a job."""
  tree = ast.parse(pathlib.Path(str(program.__file__)).read_text())
  names = {
    alias.name if isinstance(node, ast.Import) else str(node.module)
    for node in ast.walk(tree)
    if isinstance(node, ast.Import | ast.ImportFrom)
    for alias in node.names
  }
  assert not {name for name in names if name.partition('.')[0] in ('rlhf_jax', 'benchmarks')}
  assert program is tunix_jobs or 'jax' not in names
  for node in tree.body:
    if isinstance(node, ast.Import):
      assert {alias.name.partition('.')[0] for alias in node.names} <= set(sys.stdlib_module_names)


def test_every_job_is_known_to_the_peer(tmp_path: pathlib.Path) -> None:
  assert set(trl_jobs.JOBS) == set(timing.NAMES)
  assert TUNIX.jobs is not None and set(tunix_jobs.JOBS) == set(TUNIX.jobs)
  for job in workloads.JOBS:
    spec = json.loads(json.dumps(workloads.peer_spec(job, 'SMALL', tmp_path)))
    longer = workloads.peer_spec(job, '1B', tmp_path)
    assert longer['response'] == 8 * spec['response'] and longer['rows'] == spec['rows']
    assert spec['rows'] == workloads.JOBS[job].rows and spec['model']['model_type'] == 'llama'
  assert (spec['samples'], spec['kl_coefficient']) == (8, 0.04)


def test_the_conductor_speaks_as_is_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
  """A line when all is loaded, one after each step, and an end when there is nothing more to do."""
  said = io.StringIO()
  monkeypatch.setattr(conducting.os, 'dup', lambda number: number)
  monkeypatch.setattr(conducting.os, 'dup2', lambda *numbers: None)
  monkeypatch.setattr(conducting.os, 'fdopen', lambda *_: said)
  monkeypatch.setattr(sys, 'stdin', io.StringIO('go\ngo\n'))
  conductor = conducting.Conductor({'trl': '1.2'})
  conductor.loaded(7)
  conductor.done()
  with pytest.raises(SystemExit) as raised:
    conductor.done(load=1.0, export=2.0)
  assert not raised.value.code
  loaded, first, second = map(json.loads, said.getvalue().splitlines())
  assert loaded['parameters'] == 7 and loaded['versions'] == {'trl': '1.2'}
  assert first['step'] >= 0 and second == {'load': 1.0, 'export': 2.0}


class Words:
  """A tokenizer of words that puts a token in front of every text."""

  all_special_ids = (0, 1)

  def __len__(self) -> int:
    return 10

  def __call__(self, text: str) -> dict[str, list[int]]:
    return {'input_ids': [0, *(int(word) for word in text.split())]}

  def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
    return [str(number) for number in ids]


def test_texts_of_the_peer_have_the_tokens_of_the_job() -> None:
  tokenizer = Words()
  ids = tokenizer(trl_jobs.text_of(tokenizer, 6))['input_ids']
  assert len(ids) == 6 and set(ids[1:]) <= set(range(2, 10))


def test_starts_are_timed_cold_and_warm(tmp_path: pathlib.Path) -> None:
  """Both of a round have one folder of compiled programs, and every round a new one."""
  folders: list[str] = []

  def command(folder: str) -> list[str]:
    assert not os.listdir(folder)
    folders.append(folder)
    return [sys.executable, str(FAKE), str(tmp_path / 'log'), '1.0']

  found = startup.measure(command, 2, lambda: fake(tmp_path / 'theirs', 3.0))
  assert len(set(folders)) == 3
  assert found['peer']['name'] == 'fake'
  assert (tmp_path / 'log').read_text().count('peer') == 2 * 3
  assert (tmp_path / 'theirs').read_text().count('peer') == 3
  assert set(found['seconds']) == {'cold', 'warm'} and found['peer']['loaded']['parameters'] == 7
  for row in found['seconds'].values():
    assert row['peer']['all'] == found['seconds']['cold']['peer']['all']
    assert all(0 < seconds < 60 for seconds in row['ours']['all'] + row['peer']['all'])


def test_the_load_is_what_neither_we_nor_the_peer_did(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """In 10 s of 2 cores 12 s were busy: 5 were ours, 3 a peer's, so 4 of 20 were of others."""
  monkeypatch.setattr(measuring, '_PROC', tmp_path)
  monkeypatch.setattr(measuring.os, 'cpu_count', lambda: 2)
  monkeypatch.setattr(measuring.os, 'sysconf', lambda name: 100)
  (tmp_path / '7').mkdir()

  def at(clock: float, busy: int, ours: float, peers: int) -> None:
    monkeypatch.setattr(measuring.time, 'perf_counter', lambda: clock)
    monkeypatch.setattr(measuring.os, 'times', lambda: (ours, 0.0, 0.0, 0.0, 0.0))
    # user nice system idle iowait irq softirq steal
    (tmp_path / 'stat').write_text(f'cpu  {busy} 0 0 5555 99 0 0 0 0 0\ncpu0 1 2 3\n')
    (tmp_path / '7' / 'stat').write_text(f'7 (a ) b) S {"1 " * 10}{peers} 50 0 0\n')

  at(0.0, 1000, 3.0, 100)
  load = measuring.Load([7])
  at(10.0, 2200, 8.0, 400)
  assert load.others() == pytest.approx(0.2)
  (tmp_path / 'stat').unlink()
  assert load.others() is None
