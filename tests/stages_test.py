"""Stages run the ones they start from once, and refuse what does not belong together."""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
from typing import Any

import numpy as np
import pytest

from rlhf_jax import stages
from rlhf_jax.common.errors import ConfigError, RunError, UserError
from rlhf_jax.config import EvaluationConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.runs import Run
from rlhf_jax.sharding.mesh import MeshConfig
from rlhf_jax.training.checkpoints import CheckpointConfig
from rlhf_jax.training.loop import StopRequest
from rlhf_jax.training.writers import read_rows
from tests import tiny

CONFIG_FILE = """
from tests import tiny

def get_config(arg='2'):
  return tiny.make_config({case!r}, steps=int(arg), policy=tiny.InitConfig(init={init!r}))
"""


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
  """The names of the stages that were trained, in order."""
  names: list[str] = []
  real = stages.train

  def train(name: str, *arguments: Any) -> Any:
    names.append(name)
    return real(name, *arguments)

  monkeypatch.setattr(stages, 'train', train)
  return names


def write_config(folder: pathlib.Path, case: str, init: str | None = None) -> str:
  file = folder / f'{case}.py'
  file.write_text(CONFIG_FILE.format(case=case, init=init))
  return str(file)


def run(config: Any, folder: pathlib.Path, **options: Any) -> Run:
  with tiny.devices(1):
    return stages.run_stage(config, folder, root=folder.parent, **options).run


@pytest.mark.slow
def test_a_stage_runs_what_it_starts_from_once(tmp_path: pathlib.Path, trained: list[str]) -> None:
  """Cached by the fingerprint of all it depends on, shared, and made anew when that changes."""
  sft = write_config(tmp_path, 'sft')
  reward_model = write_config(tmp_path, 'reward_model', sft)

  def cpl(**changes: Any) -> Any:
    starts = {
      'policy': InitConfig(init=sft),
      'reward_model': RewardModelInitConfig(init=reward_model),
    }
    return tiny.make_config('cpl', steps=1, **{**starts, **changes})

  # The reward model starts from the SFT stage too, which runs once for both.
  first = run(cpl(), tmp_path / 'first')
  assert trained == ['sft', 'reward_model', 'cpl']
  found = first.parents()
  assert found['policy'].params_sha256 == found['reward_model'].parents()['policy'].params_sha256
  assert found['policy'].folder.parent == (tmp_path / 'stages').absolute()

  trained.clear()
  second = run(cpl(seed=1), tmp_path / 'second')
  assert trained == ['cpl']
  assert second.parents()['policy'].folder == found['policy'].folder

  trained.clear()
  third = run(cpl(policy=InitConfig(init=f'{sft}:3')), tmp_path / 'third')
  assert trained == ['sft', 'cpl']
  assert third.parents()['policy'].folder != found['policy'].folder
  assert len(list((tmp_path / 'stages').glob('sft-*'))) == 2

  # What the reward model starts from is part of its fingerprint.
  trained.clear()
  other = write_config(tmp_path, 'reward_model', f'{sft}:3')
  assert other == reward_model
  fourth = run(cpl(), tmp_path / 'fourth')
  assert trained == ['reward_model', 'cpl']
  assert fourth.parents()['reward_model'].folder != found['reward_model'].folder

  # Naming the run directory instead of the config is the same stage.
  trained.clear()
  named = cpl(
    policy=InitConfig(init=str(found['policy'].folder)),
    reward_model=RewardModelInitConfig(init=str(found['reward_model'].folder)),
  )
  assert run(named, tmp_path / 'first').params_sha256 == first.params_sha256
  assert trained == []


def test_a_stage_that_another_needs_can_be_stopped(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, trained: list[str]
) -> None:
  """It is saved, the whole ends as stopped, and the same call goes on with it."""
  config = tiny.make_config('cpl', steps=1)
  config.policy.init = write_config(tmp_path, 'sft')

  def stopped_at_once(stop: StopRequest) -> StopRequest:
    stop._signals = 1
    return stop

  with monkeypatch.context() as patch:
    patch.setattr(StopRequest, '__enter__', stopped_at_once)
    with pytest.raises(stages.StoppedError):
      run(config, tmp_path / 'run')
  assert trained == ['sft'] and not (tmp_path / 'run').exists()
  (folder,) = (path for path in (tmp_path / 'stages').iterdir() if path.is_dir())
  assert Run(folder).result is None
  with tiny.devices(1):
    outcome = stages.run_stage(config, tmp_path / 'run', root=tmp_path)
  assert trained == ['sft', 'sft', 'cpl'] and not outcome.stopped
  assert [row['step'] for row in read_rows(folder / 'metrics.jsonl')] == [2]


def test_a_directory_of_another_config_is_refused(
  tmp_path: pathlib.Path, trained: list[str]
) -> None:
  """The differing fields are named; --overwrite starts over; the same config is finished."""
  config = tiny.make_config('sft', steps=2)
  first = run(config, tmp_path / 'run')
  sha = first.params_sha256
  other = tiny.make_config('sft', steps=2, seed=5)
  other.optimizer.learning_rate = 0.5
  with pytest.raises(RunError) as caught:
    run(other, tmp_path / 'run')
  message = str(caught.value)
  for line in ('config.optimizer.learning_rate: 0.01 -> 0.5', 'config.seed: 0 -> 5', '--overwrite'):
    assert line in message
  assert 'steps' not in message
  (tmp_path / 'run' / 'leftover').write_text('x')
  assert run(config, tmp_path / 'run').params_sha256 == sha and trained == ['sft']
  assert run(other, tmp_path / 'run', overwrite=True).params_sha256 != sha
  assert not (tmp_path / 'run' / 'leftover').exists()
  assert [row['step'] for row in read_rows(tmp_path / 'run' / 'metrics.jsonl')] == [2]


def test_a_folder_of_something_else_is_never_touched(tmp_path: pathlib.Path) -> None:
  (tmp_path / 'thesis').mkdir()
  (tmp_path / 'thesis' / 'chapter.tex').write_text('x')
  for overwrite in (False, True):
    with pytest.raises(RunError, match='not a run directory'):
      run(tiny.make_config('sft'), tmp_path / 'thesis', overwrite=overwrite)
  assert (tmp_path / 'thesis' / 'chapter.tex').read_text() == 'x'


def test_a_run_directory_says_where_it_came_from(parents: pathlib.Path) -> None:
  """Config, packages, revision, data, seeds; the result has the documented fields."""
  folder = parents / 'reward_model'
  record = json.loads((folder / 'record.json').read_text())
  for name in ('jax', 'flax', 'optax', 'orbax-checkpoint', 'numpy'):
    assert record['packages'][name]
  assert record['seeds'] == {'run': 0, 'evaluation': 0}
  assert record['data_fingerprint'] == tiny.feedback_of(6).fingerprint
  assert {'git_revision', 'python', 'backend', 'devices', 'command'} <= record.keys()
  assert Run(folder).config == tiny.make_config(
    'reward_model', steps=3, policy=InitConfig(init=str((parents / 'sft').absolute()))
  )
  result = json.loads((folder / 'result.json').read_text())
  assert result['step'] == 3 and result['metrics']['step'] == 3 and result['tokens'] > 0
  assert len(result['params_sha256']) == 64 and result['best_step'] is None
  assert Run(folder).model.vocab_size == len(tiny.feedback_of(6).task.vocabulary()) + 4


def test_a_file_system_without_locks_is_no_obstacle(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  """As some of clusters are; what else goes wrong with a lock is an error."""
  for number, allowed in ((errno.ENOSYS, True), (errno.EIO, False)):

    def refuse(*unused: Any, number: int = number) -> None:
      raise OSError(number, os.strerror(number))

    monkeypatch.setattr(stages.fcntl, 'flock', refuse)
    with contextlib.nullcontext() if allowed else pytest.raises(OSError):
      with stages.locked(tmp_path / 'run'):
        assert 'start nothing else there' in capsys.readouterr().out


@pytest.mark.slow
def test_a_stage_can_start_from_the_best_evaluation(tmp_path: pathlib.Path) -> None:
  """The best step by the named metric is kept beside the last, and is another's start."""
  config = tiny.make_config(
    'sft',
    steps=6,
    evaluation=EvaluationConfig(every=2, prompts=0, records=8, batch_size=tiny.ROWS),
    checkpoint=CheckpointConfig(every=0, keep=1, best_metric='held_out_nll', best_mode='max'),
  )
  sft = run(config, tmp_path / 'sft')
  rows = read_rows(sft.folder / 'evaluations.jsonl')
  best = max(rows[1:], key=lambda row: row['held_out_nll'])['step']
  assert sft.require_result()['best_step'] == best == 2
  assert sft.step('best') == 2 and sft.step('final') == 6
  starts = {}
  for checkpoint in ('final', 'best'):
    cpl = tiny.make_config('cpl', steps=1)
    cpl.policy = InitConfig(init=str(sft.folder), checkpoint=checkpoint)
    built = tiny.build_recipe(cpl)
    starts[checkpoint] = np.asarray(built.recipe.init().params['policy']['embedding'])
  assert not np.array_equal(starts['best'], starts['final'])


def test_a_best_metric_that_nothing_gives_is_named(tmp_path: pathlib.Path) -> None:
  config = tiny.make_config('sft', checkpoint=CheckpointConfig(best_metric='reward'))
  config.evaluation.records = 8
  with pytest.raises(ConfigError, match='best_metric.*held_out_nll'):
    run(config, tmp_path / 'run')


def start(**changes: Any) -> Any:
  return dataclasses.replace(tiny.make_config('dpo'), **changes)


def test_a_start_that_is_none_is_named(parents: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """No such path, an unfinished run, no 'best', a run of the wrong kind, a config of a study."""

  def refused(**policy: Any) -> str:
    with pytest.raises(UserError) as caught:
      run(start(policy=InitConfig(**policy)), tmp_path / 'run')
    assert not (tmp_path / 'run').exists(), 'a run that cannot begin leaves nothing behind'
    return str(caught.value)

  assert 'none at that path' in refused(init='no/such')
  assert 'finished run' in refused(init=str(tmp_path))
  assert 'best_metric' in refused(init=str(parents / 'sft'), checkpoint='best')
  assert 'That trains a reward model' in refused(init=str(parents / 'reward_model'))
  study = tmp_path / 'study.py'
  study.write_text('def get_config(): return {}')
  assert 'config of one stage' in refused(init=str(study))


def test_a_reward_model_with_other_tokens_is_refused(
  parents: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """Its token ids would mean other words."""
  other = tmp_path / 'reward_model'
  other.mkdir()
  for name in ('config.json', 'result.json'):
    (other / name).write_text((parents / 'reward_model' / name).read_text())
  first, second = tiny.feedback_of(6).task.vocabulary()[:2]
  (other / 'tokenizer').mkdir()
  for path in (parents / 'reward_model' / 'tokenizer').iterdir():
    text = path.read_text().replace(f'"{first}"', '"?"').replace(f'"{second}"', f'"{first}"')
    (other / 'tokenizer' / path.name).write_text(text.replace('"?"', f'"{second}"'))
  config = tiny.make_config('ppo', parents)
  config.reward_model.init = str(other)
  assert Run(other).tokenizer().encode_batch([first]) != Run(
    parents / 'sft'
  ).tokenizer().encode_batch([first])
  with pytest.raises(ConfigError, match='reward_model.init.*tokenizer'):
    tiny.build_recipe(config)


@pytest.mark.parametrize(
  ('changes', 'field'),
  [
    ({'batch_size': 4}, 'batch_size'),
    ({'accumulation': 2}, 'batch_size'),
    (
      {'evaluation': EvaluationConfig(prompts=0, records=0, batch_size=12)},
      'evaluation.batch_size',
    ),
    ({'mesh': MeshConfig(data=3)}, 'mesh.data'),
    ({'mesh': MeshConfig(data=2, tensor=4)}, 'mesh.tensor'),
    ({'mesh': MeshConfig(data=-1, fsdp=3)}, 'mesh.data'),
  ],
)
def test_a_mesh_that_does_not_fit_is_named(changes: dict[str, Any], field: str) -> None:
  """Rows over devices, the devices themselves, heads over the tensor axis: before any compile."""
  config = tiny.make_config('sft', **changes)
  with pytest.raises(ConfigError) as caught:
    tiny.build_recipe(config, 8)
  assert caught.value.field == field


def test_a_circle_of_configs_is_refused(tmp_path: pathlib.Path) -> None:
  """A stage that starts from itself, by whatever way, could never begin."""
  file = tmp_path / 'cpl.py'
  write_config(tmp_path, 'cpl', init=str(file))
  config = tiny.make_config('cpl')
  config.policy.init = str(file)
  with pytest.raises(ConfigError, match='is a circle'):
    run(config, tmp_path / 'run')


def test_a_parent_config_on_another_source_is_refused(tmp_path: pathlib.Path) -> None:
  """Its tokenizer would know nothing of this stage's texts."""
  lines = [f'{{"prompt": "a {i}", "chosen": "b {i}", "rejected": "c"}}' for i in range(40)]
  data = tmp_path / 'data.jsonl'
  data.write_text('\n'.join(lines) + '\n')
  config = tiny.make_config('cpl')
  config.policy.init = write_config(tmp_path, 'sft')
  config.data.source, config.data.path = 'jsonl', str(data)
  with pytest.raises(ConfigError, match='a config on the same source'):
    run(config, tmp_path / 'run')
