"""Run directories are read back as they were written, and damage is named."""

import json
import pathlib

import numpy as np
import pytest

from rlhf_jax.common.errors import RunError
from rlhf_jax.config_values import to_dict
from rlhf_jax.runs import Run, fingerprint, write_json
from rlhf_jax.sharding.mesh import MeshConfig
from tests import tiny


def test_a_fingerprint_depends_on_values_alone() -> None:
  """Not on the order of keys; on every value."""
  assert fingerprint({'a': 1, 'b': [2]}) == fingerprint({'b': [2], 'a': 1})
  assert len({fingerprint(x) for x in ({'a': 1}, {'a': 2}, {'a': 1.5}, {'a': '1'}, {})}) == 5


def test_json_files_are_whole_or_absent(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Interrupted before it is in place, the old content stays."""
  path = tmp_path / 'result.json'
  write_json(path, {'a': 1})
  with pytest.raises(TypeError):
    write_json(path, {'a': object()})
  monkeypatch.setattr(pathlib.Path, 'replace', lambda self, target: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    write_json(path, {'a': 2})
  assert json.loads(path.read_text()) == {'a': 1}


def claimed(folder: pathlib.Path, **parents: Run) -> Run:
  run = Run(folder)
  run.claim(
    {'config': to_dict(tiny.make_config('dpo', 'x')), 'data': 'd'},
    parents,
    {'mesh': to_dict(MeshConfig(fsdp=2))},
  )
  return run


def test_a_run_gives_its_config_with_its_parents_filled_in(tmp_path: pathlib.Path) -> None:
  run = claimed(tmp_path / 'dpo', policy=Run(tmp_path / 'sft'))
  config = Run(tmp_path / 'dpo').config
  assert config.policy.init == str(tmp_path / 'sft') and config.reward_model.init is None
  assert config.objective == tiny.make_config('dpo').objective
  assert config.mesh == MeshConfig(fsdp=2)
  assert [parent.folder for parent in run.parents().values()] == [tmp_path / 'sft']


def test_what_is_no_run_or_not_finished_is_named(tmp_path: pathlib.Path) -> None:
  with pytest.raises(RunError, match='no config.json'):
    _ = Run(tmp_path).config
  run = claimed(tmp_path / 'dpo')
  assert run.result is None
  with pytest.raises(RunError, match='not finished.*command again'):
    _ = run.params_sha256
  with pytest.raises(RunError, match='not finished'):
    run.step('final')
  (tmp_path / 'dpo' / 'config.json').write_text('{"identity": ')
  with pytest.raises(RunError, match='config.json: damaged'):
    _ = run.config
  for name in ('result', 'record'):
    (tmp_path / 'dpo' / f'{name}.json').write_bytes(b'{"a": "\xff"}')
    with pytest.raises(RunError, match=f'{name}.json: damaged.*Delete it, and run the command'):
      getattr(run, name)


def test_a_record_keeps_what_it_said_where_a_run_goes_on_elsewhere(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  run = claimed(tmp_path / 'dpo')
  path = run.folder / 'record.json'
  record = {'packages': {'jax': '1'}, 'mesh': {'data': 8}, 'command': ['a']}
  run.add_record(record)
  run.add_record(record)
  assert json.loads(path.read_text()) == {**record, 'earlier': []}
  (run.folder / 'metrics.jsonl').write_text('{"step": 1}\n')
  other = {**record, 'command': ['b']}
  run.add_record(other)
  assert not capsys.readouterr().out
  moved = {**other, 'packages': {'jax': '2'}, 'mesh': {'data': 1}}
  run.add_record(moved)
  assert 'goes on with another mesh, packages; its bits may differ' in capsys.readouterr().out
  assert json.loads(path.read_text()) == {**moved, 'earlier': [record, other]}


def test_a_directory_that_is_free_or_its_own_passes(tmp_path: pathlib.Path) -> None:
  run = claimed(tmp_path / 'dpo')
  identity = {'config': to_dict(tiny.make_config('dpo', 'x')), 'data': 'd'}
  run.check(identity, overwrite=False)
  (tmp_path / 'dpo' / 'metrics.jsonl').write_text('{"step": 1}\n')
  run.claim(identity, {}, {})
  assert (tmp_path / 'dpo' / 'metrics.jsonl').exists(), 'its own content is kept'
  (tmp_path / 'empty').mkdir()
  Run(tmp_path / 'empty').check(identity, overwrite=False)
  Run(tmp_path / 'absent').check(identity, overwrite=False)
  with pytest.raises(RunError, match="data: 'd' -> 'e'\n'data' stands for the records: those of"):
    run.check({**identity, 'data': 'e'}, overwrite=False)


@pytest.mark.parametrize('trace', ['checkpoints/3/x', 'nonfinite/step_1.npz', 'metrics.jsonl'])
def test_a_run_that_never_made_a_step_gives_way_to_another(
  tmp_path: pathlib.Path, trace: str
) -> None:
  """What a mistake in the config leaves behind is no result; any trace of a step is."""
  run = claimed(tmp_path / 'dpo')
  (run.folder / 'evaluations.jsonl').write_text('{"step": 0}\n')
  (run.folder / 'metrics.jsonl').touch()
  (run.folder / 'checkpoints').mkdir()
  run.check({'data': 'e'}, overwrite=False)
  path = run.folder / trace
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('x')
  with pytest.raises(RunError, match='another config'):
    run.check({'data': 'e'}, overwrite=False)


def test_answers_are_read_by_number(tmp_path: pathlib.Path) -> None:
  """A step may be from a file that somebody else wrote; it is no part of a path."""
  run = Run(tmp_path / 'run')
  folder = run.folder / 'evaluations'
  folder.mkdir(parents=True)
  np.savez(folder / '00000003.npz', kl=np.arange(2.0), prompt=np.array(['a', 'b']))
  found = run.answers(3)
  assert found['kl'].tolist() == [0, 1] and found['prompt'].tolist() == ['a', 'b']
  np.savez(tmp_path / '00000003.npz', kl=np.zeros(2))
  for step in ('../../00000003', '3', -1, 3.0, None, True):
    with pytest.raises(RunError, match='is no number'):
      run.answers(step)  # type: ignore[arg-type]
  with pytest.raises(RunError, match='00000004.npz: missing'):
    run.answers(4)


def test_a_run_behind_a_link_is_deleted_in_its_place(tmp_path: pathlib.Path) -> None:
  """The link stays, and what a link inside points to."""
  run = claimed(tmp_path / 'disk' / 'dpo')
  (tmp_path / 'kept').mkdir()
  (run.folder / 'inside').symlink_to(tmp_path / 'kept', target_is_directory=True)
  (tmp_path / 'dpo').symlink_to(run.folder, target_is_directory=True)
  Run(tmp_path / 'dpo').claim({'config': {}, 'data': 'e'}, {}, {})
  assert (tmp_path / 'dpo').is_symlink() and (tmp_path / 'kept').is_dir()
  assert sorted(path.name for path in run.folder.iterdir()) == ['config.json']
  assert not list((tmp_path / 'disk').glob('.*'))


def test_a_run_hands_on_no_file_that_it_only_points_to(tmp_path: pathlib.Path) -> None:
  """A directory from elsewhere could otherwise have files of this machine exported."""
  run = claimed(tmp_path / 'sft')
  (run.folder / 'hf').mkdir()
  (run.folder / 'hf' / 'config.json').write_text('{}')
  run.save_assets(tmp_path / 'first')
  assert (tmp_path / 'first' / 'hf' / 'config.json').read_text() == '{}'
  (tmp_path / 'secret').write_text('key')
  (run.folder / 'hf' / 'tokenizer.json').symlink_to(tmp_path / 'secret')
  with pytest.raises(RunError, match='tokenizer.json: a symbolic link'):
    run.save_assets(tmp_path / 'second')
  assert not (tmp_path / 'second').exists()
