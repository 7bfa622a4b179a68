"""The planner as it is called."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
  """Runs the program."""
  command = [sys.executable, '-m', 'experiments.plan', *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.slow
def test_a_large_model_on_many_devices(tmp_path: Path) -> None:
  """PPO of a 70B policy, its reference and a 70B reward model on 256, of configs never run.

  The documentation shows this plan: what stays on a device is there what the program says.
  """
  done = plan(
    '--config=configs/plan_llama_70b.py',
    '--config.mesh.data=1',
    '--config.mesh.fsdp=32',
    '--config.mesh.tensor=8',
    '--accelerator=H100',
    f'--json={tmp_path / "plan.json"}',
  )
  assert done.returncode == 0, done.stderr
  numbers = json.loads((tmp_path / 'plan.json').read_text('utf-8'))
  resident = numbers['bytes_per_device']['resident']
  # float32 over fsdp x tensor, and two moments.
  expected = numbers['parameters']['policy'] * 4 / 256
  assert numbers['devices'] == 256 and numbers['parameters']['policy'] > 69e9
  for role in ('policy', 'reference (frozen)', 'reward_model (frozen)'):
    assert resident[role] == pytest.approx(expected, rel=0.02)
  assert resident['optimizer'] == pytest.approx(2 * resident['policy'], rel=0.01)
  assert numbers['flops_per_step']['update']['policy'] > 6 * 69e9 * 256 * 2047
  assert 'H100: fits' in done.stdout
  page = (ROOT / 'docs' / 'planning.md').read_text('utf-8')
  start, end = map(
    done.stdout.index, ('memory of a device, resident:', 'memory of a device, while')
  )
  resident_part = textwrap.indent(done.stdout[start:end].rstrip(), '    ')
  assert resident_part in page, 'Renew the page by the command that it shows.'
  # At every token a device is sent sums of the others' probabilities, not each of them.
  sent = numbers['programs']['generation']['collectives']
  of_tensor = [each for each in sent if (each['kind'], each['axes']) == ('all-gather', 'tensor')]
  assert sum(each['total'] for each in of_tensor) < 0.1e9


def test_what_is_wrong_is_said_at_once() -> None:
  """A mesh of unknown size; nothing is compiled."""
  done = plan('--config=configs/dpo.py')
  assert done.returncode == 1 and '--devices' in done.stderr and 'Traceback' not in done.stderr
