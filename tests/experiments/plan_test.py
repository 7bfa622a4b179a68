"""The planner as it is called."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
  """Runs the program."""
  command = [sys.executable, '-m', 'experiments.plan', *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.slow
def test_a_large_model_on_many_devices(tmp_path: Path) -> None:
  """Configs that were never run, 64 devices, no weights: a 70B reward model."""
  done = plan(
    '--config=configs/plan_llama_70b.py:reward_model',
    '--config.mesh.data=2',
    '--config.mesh.fsdp=4',
    '--config.mesh.tensor=8',
    '--accelerator=H100',
    f'--json={tmp_path / "plan.json"}',
  )
  assert done.returncode == 0, done.stderr
  numbers = json.loads((tmp_path / 'plan.json').read_text('utf-8'))
  resident = numbers['bytes_per_device']['resident']
  # float32 over fsdp x tensor, and two moments.
  expected = numbers['parameters']['reward_model'] * 4 / 32
  assert numbers['devices'] == 64 and numbers['parameters']['reward_model'] > 69e9
  assert resident['reward_model'] == pytest.approx(expected, rel=0.01)
  assert resident['optimizer'] == pytest.approx(2 * expected, rel=0.01)
  assert numbers['flops_per_step']['update']['reward_model'] > 6 * 69e9 * 512 * 2047
  assert 'H100: ' in done.stdout and 'memory of a device, resident:' in done.stdout


def test_what_is_wrong_is_said_at_once() -> None:
  """A mesh of unknown size; nothing is compiled."""
  done = plan('--config=configs/dpo.py')
  assert done.returncode == 1 and '--devices' in done.stderr and 'Traceback' not in done.stderr
