"""The program that trains a stage, called as a user calls it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.experiments.programs import ROOT, message, run_program

pytestmark = pytest.mark.slow

SFT, DPO, PPO = (f'--config=configs/{name}.py' for name in ('sft', 'dpo', 'ppo'))
# Enough for a signal to arrive in between.
STEPS = 400
JSONL = '--config.data.source=jsonl'

# What is wrong, the flags, and what the message must say.
MISTAKES: dict[str, tuple[list[str], list[str]]] = {
  'unknown field': ([SFT, '--config.stepss=3'], ['--config.stepss', "mean 'steps'"]),
  'unknown field within': (
    [DPO, '--config.objective.betta=1'],
    ['--config.objective.betta', "mean 'beta'"],
  ),
  'field of another objective': (
    [DPO, '--config.objective.minibatches=2'],
    ['DPOConfig', "'minibatches'"],
  ),
  'unknown flag': ([SFT, '--workdirs=x'], ['workdirs']),
  'no flag': ([SFT, 'steps=3'], ['steps=3', '--name=value']),
  'no value': ([SFT, '--config.model.kv_heads=None', '--config.seed=None'], ['seed=None', 'value']),
  'a seed of 33 bits': ([SFT, '--config.seed=4294967296'], ['seed=4294967296', '2**32 - 1']),
  'an argument of none': ([f'{DPO}:x'], ['dpo.py:x', 'takes no argument']),
  'parent of another kind': (
    [PPO, f'--config.reward_model.init={SFT.partition("=")[2]}'],
    ['reward_model.init=', 'That trains a policy'],
  ),
  'parent without a best': (
    [DPO, '--config.policy.checkpoint=best'],
    ["policy.checkpoint='best'", "'final' with configs/sft.py"],
  ),
  'parent on these devices': (
    [DPO, '--config.mesh.tensor=1', '--config.batch_size=66', '--config.data.held_out=0'],
    ['no held_out prompts'],
  ),
  'wrong type': ([SFT, '--config.steps=ten'], ['--config.steps', 'ten']),
  'wrong type of a list': ([SFT, '--config.generation.stop_tokens=a'], ['stop_tokens']),
  'no such config': (['--config=configs/stf.py'], ['configs/stf.py', 'no config file']),
  'a study': (['--config=configs/quickstart.py'], ['StudyConfig', 'experiments.compare']),
  'no config': ([], ['--config']),
  'response length': ([SFT, '--config.data.response_length=0'], ['data.response_length=0', '>= 1']),
  'accumulation': (
    [SFT, '--config.batch_size=64', '--config.accumulation=3'],
    ['batch_size=64', 'multiple of accumulation 3'],
  ),
  'minibatches': (
    [PPO, '--config.batch_size=9', '--config.objective.minibatches=2'],
    ['batch_size=9', 'objective.minibatches 2'],
  ),
  'devices': ([SFT, '--config.mesh.data=2'], ['mesh.data=2', '1 devices']),
  'heads': ([SFT, '--config.model.heads=3'], ['model.heads=3', 'model.width=64']),
  'no reward': (
    [PPO, '--config.reward_model.init=None'],
    ['reward_model.init=None', "rollout.rewards[0].source='task'"],
  ),
  'no start': ([DPO, '--config.policy.init=None'], ['policy.init=None']),
  'start that is not there': ([DPO, '--config.policy.init=runs/no'], ["policy.init='runs/no'"]),
  'no path': ([SFT, JSONL], ['data.path=None', '--config.data.path=FILE']),
  'no file': ([SFT, JSONL, '--config.data.path=no.jsonl'], ['no.jsonl', 'no such file']),
  'bad line': (
    [SFT, JSONL, '--config.data.path={tmp}/bad.jsonl'],
    ['bad.jsonl:2', "'response'", 'quarantine'],
  ),
  'no JSON': ([SFT, JSONL, '--config.data.path={tmp}/no_json.jsonl'], ['no_json.jsonl:1', 'JSON']),
  'not UTF-8': ([SFT, JSONL, '--config.data.path={tmp}/latin.jsonl'], ['latin.jsonl', 'UTF-8']),
  'another run': (
    [SFT, '--config.steps=7', '--workdir={parents}/sft'],
    ['another config', 'config.steps: 3 -> 7', '--overwrite'],
  ),
}


@pytest.fixture(scope='module')
def answers(
  parents: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, str, str]]:
  """Exit code and output of each mistake."""
  tmp = tmp_path_factory.mktemp('mistakes')
  good = {'prompt': 'the soup', 'response': 'was good'}
  (tmp / 'bad.jsonl').write_text(
    f'{json.dumps(good)}\n{json.dumps({**good, "response": ""})}\n{json.dumps(good)}\n'
  )
  (tmp / 'no_json.jsonl').write_text('{"prompt": \n')
  (tmp / 'latin.jsonl').write_bytes(json.dumps(good, ensure_ascii=False).encode() + b'\xe9\n')
  lines = []
  for given, _ in MISTAKES.values():
    flags = [text.format(tmp=tmp, parents=parents) for text in given]
    if not any(text.startswith('--workdir=') for text in flags):
      flags.append(f'--workdir={tmp / "run"}')
    lines.append(flags)
  done = subprocess.run(
    [sys.executable, '-m', 'tests.experiments.commands'],
    cwd=ROOT,
    input=json.dumps(lines),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  assert not (tmp / 'run').exists(), 'a mistake leaves nothing behind'
  return dict(zip(MISTAKES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_ends_with_one_message(
  mistake: str, answers: dict[str, tuple[int, str, str]]
) -> None:
  """Exit code 1, no traceback, and what is wrong, by its name."""
  code, _, error = answers[mistake]
  assert code == 1 and 'Traceback' not in error
  assert error.count('error: ') == 1
  for words in MISTAKES[mistake][1]:
    assert words in error


def test_debug_shows_where_it_happened(tmp_path: pathlib.Path) -> None:
  done = run_program('train', SFT, f'--workdir={tmp_path / "run"}', '--config.steps=0', '--debug')
  assert done.returncode == 1
  assert 'Traceback' in done.stderr and 'error: --config.steps=0' in done.stderr


def test_help_lists_what_there_is() -> None:
  done = run_program('train', '--help')
  assert done.returncode == 0
  for words in ('--config=configs/dpo.py', 'Exit codes', '--workdir', '--[no]overwrite', '--root'):
    assert words in done.stdout


def test_a_real_mistake_in_a_process_of_its_own(tmp_path: pathlib.Path) -> None:
  """The same as in `answers`, without the shortcut of one process for all."""
  done = run_program('train', SFT, f'--workdir={tmp_path / "run"}', '--config.model.width=30')
  assert 'model.heads=4' in message(done) and not (tmp_path / 'run').exists()


def test_a_terminated_program_says_that_it_can_go_on(tmp_path: pathlib.Path) -> None:
  """SIGTERM: exit code 75, the state saved; that it then ends as ever is in tests/faults."""
  file = tmp_path / 'config.py'
  file.write_text(
    'from tests import tiny\n'
    'def get_config(arg=None):\n'
    f"  config = tiny.make_config('sft', steps={STEPS})\n"
    '  config.log.every = 10\n'
    '  return config\n'
  )
  command = [
    sys.executable,
    '-m',
    'experiments.train',
    f'--config={file}',
    f'--workdir={tmp_path / "run"}',
    '--config.optimizer.learning_rate=0.02',
  ]
  environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
  process = subprocess.Popen(
    command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  metrics = tmp_path / 'run' / 'metrics.jsonl'
  deadline = time.monotonic() + 240
  while not metrics.exists() or not metrics.read_text():
    assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  out, error = process.communicate(timeout=120)
  assert process.returncode == 75, error
  assert 'run the same command again' in out and 'Traceback' not in error
  assert not (tmp_path / 'run' / 'result.json').exists()
  steps = [int(path.name) for path in (tmp_path / 'run' / 'checkpoints').iterdir()]
  assert len(steps) == 1 and 10 <= steps[0] < STEPS
