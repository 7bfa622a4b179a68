"""Where a stage sets bad records aside, and files that change under it."""

import dataclasses
import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_jax import reading, stages
from rlhf_jax.common.errors import DataError, RunError
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.data.config import DataConfig
from rlhf_jax.data.sources import load
from rlhf_jax.runs import Run


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
  side_file = reading.quarantine_file(config.data, tmp_path / 'runs')
  (reject,) = map(json.loads, side_file.read_text().splitlines())
  assert (reject['number'], reject['field'], reject['reason']) == (4, 'response', 'empty response')
  assert json.loads(reject['raw']) == {'prompt': 'say 3', 'response': ''}


def test_by_default_the_stage_refuses(tmp_path: Path) -> None:
  """File, line and field are named, and nothing is written."""
  with pytest.raises(DataError, match=r"rows.jsonl:4: field 'response'"):
    stages.resolve(make_config(tmp_path, 'strict'), tmp_path / 'runs')
  assert not (tmp_path / 'runs').exists()


def test_a_damaged_file_is_read_as_far_as_it_goes_and_the_record_says_so(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """What is known of the data is in the run's record, from where a study's report has it."""
  config = make_config(tmp_path, 'quarantine')
  rows = (tmp_path / 'rows.jsonl').read_bytes()
  config.data.path = str(tmp_path / 'rows.jsonl.gz')
  Path(config.data.path).write_bytes(gzip.compress(rows)[:-8])
  stage = stages.resolve(config, tmp_path / 'runs')
  assert stage.feedback.quarantined == 2
  (damage,) = stage.feedback.damage
  assert damage.startswith(f'{config.data.path}:11: not a whole gzip file') and 'line 10' in damage
  monkeypatch.setattr(stages, 'environment_record', dict)
  run = Run(tmp_path / 'runs' / 'run')
  recipe, mesh = SimpleNamespace(rows=8), SimpleNamespace(shape={})
  built: Any = SimpleNamespace(recipe=recipe, tokenizer=None, mesh=mesh)
  stages._begin(stage, run, built)
  record = json.loads((run.folder / 'record.json').read_text())
  assert (record['quarantined_records'], record['damaged_sources']) == (2, [damage])


def test_a_mended_file_leaves_no_side_file(tmp_path: Path) -> None:
  """What was set aside of the file as it was before would be taken for what is set aside now."""
  config = make_config(tmp_path, 'quarantine')
  root = tmp_path / 'runs'
  reading.load_data(config.data, root)
  assert reading.quarantine_file(config.data, root).is_file()
  Path(str(config.data.path)).write_text('{"prompt": "say 1", "response": "1"}\n' * 3)
  feedback = load(
    dataclasses.replace(config.data, held_out=0.0), reading.quarantine_file(config.data, root)
  )
  assert feedback.quarantined == 0 and not reading.quarantine_file(config.data, root).exists()


def test_a_file_that_changes_between_two_stages_is_refused(tmp_path: Path) -> None:
  """Whether the second reads it again or has it from the first; touching it changes nothing."""
  first = make_config(tmp_path, 'quarantine').data
  second = dataclasses.replace(first, responses='all')
  path = Path(str(first.path))
  before = path.read_text()
  reading.load_data(first, tmp_path)
  path.write_text(before.replace('"9"', '"ten"'))
  for data in (first, second):
    with pytest.raises(DataError, match=r'rows.jsonl: changed since this process first read it'):
      reading.load_data(data, tmp_path)
  path.write_text(before)
  assert reading.load_data(second, tmp_path).quarantined == 1


def test_a_file_that_changed_before_a_run_goes_on_is_refused(tmp_path: Path) -> None:
  """The fingerprint of its records is part of what the run is; one line changes it."""
  config = make_config(tmp_path, 'quarantine')
  root = tmp_path / 'runs'
  stage = stages.resolve(config, root)
  run = Run(root / 'run')
  run.claim(stage.identity, {}, {})
  (run.folder / 'metrics.jsonl').write_text('{"step": 1}\n')
  run.check(stage.identity, overwrite=False)
  path = Path(str(config.data.path))
  path.write_text(path.read_text().replace('"9"', '"ten"'))
  identity = {**stage.identity, 'data': load(config.data, tmp_path / 'side').fingerprint}
  with pytest.raises(RunError, match=r'another config; it differs .*\n  data: \'\w+\' -> \'\w+\''):
    run.check(identity, overwrite=False)


@pytest.mark.parametrize('name', ['../../x', 'a/../../b', '/etc/passwd', 'ä:\n\0', 'x' * 300, '..'])
def test_a_side_file_stays_in_its_folder(name: str, tmp_path: Path) -> None:
  """Whatever a source is called."""
  for data in (DataConfig(source='jsonl', path=name), DataConfig(source=f'tfds:{name}')):
    side_file = reading.quarantine_file(data, tmp_path)
    assert side_file.resolve().parent == (tmp_path / 'quarantine').resolve()
    side_file.parent.mkdir(exist_ok=True)
    side_file.write_text('')
