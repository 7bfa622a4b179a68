"""Where a stage sets bad records aside."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_jax import stages
from rlhf_jax.common.errors import DataError
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.data.config import DataConfig


def make_config(folder: Path, on_error: str) -> ExperimentConfig:
  """An SFT stage on ten demonstrations, the fourth of which is empty."""
  rows = [{'prompt': f'say {n}', 'response': '' if n == 3 else f'{n}'} for n in range(10)]
  path = folder / 'rows.jsonl'
  path.write_text('\n'.join(map(json.dumps, rows)))
  data = DataConfig(source='jsonl', path=str(path), held_out=2.0, on_error=on_error)
  return ExperimentConfig(name='quarantined', data=data)


def test_a_side_file_under_the_root_holds_the_line_and_the_reason(tmp_path: Path) -> None:
  """The good records are used; the bad one is counted, and kept whole beside the runs."""
  config = make_config(tmp_path, 'quarantine')
  feedback: Any = stages.resolve(config, tmp_path / 'runs').feedback
  assert feedback.quarantined == 1
  assert len(feedback.train.demonstrations) + len(feedback.held_out.demonstrations) == 9
  side_file = stages.quarantine_file(config.data, tmp_path / 'runs')
  (reject,) = map(json.loads, side_file.read_text().splitlines())
  assert (reject['number'], reject['field'], reject['reason']) == (4, 'response', 'empty response')
  assert json.loads(reject['raw']) == {'prompt': 'say 3', 'response': ''}


def test_by_default_the_stage_refuses(tmp_path: Path) -> None:
  """File, line and field are named, and nothing is written."""
  with pytest.raises(DataError, match=r"rows.jsonl:4: field 'response'"):
    stages.resolve(make_config(tmp_path, 'strict'), tmp_path / 'runs')
  assert not (tmp_path / 'runs').exists()
