"""What programs share: the checks of flags that several of them have."""

import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from absl import flags
from ml_collections import config_flags

from experiments import cli
from rlhf_jax.common.errors import UserError
from rlhf_jax.config import load_config
from rlhf_jax.rollout.config import RewardConfig
from tests.experiments.programs import ROOT


def test_only_flags_that_were_given_count() -> None:
  """Zero and the empty text are values."""
  assert cli.not_none({'a': None, 'b': 0, 'c': '', 'd': 0.5}) == {'b': 0, 'c': '', 'd': 0.5}


def test_the_place_of_the_json_must_be_there(tmp_path: pathlib.Path) -> None:
  """Its folder must exist, and it may replace a file but not a folder."""
  assert cli.json_path(None) is None
  path = tmp_path / 'out.json'
  assert cli.json_path(str(path)) == path
  path.write_text('{}')
  assert cli.json_path(str(path)) == path
  with pytest.raises(UserError, match=f'--json=.*there is no folder {tmp_path / "absent"}'):
    cli.json_path(str(tmp_path / 'absent' / 'out.json'))
  for folder in (str(tmp_path), ''):
    with pytest.raises(UserError, match='a folder; name a file'):
      cli.json_path(folder)


@pytest.mark.filterwarnings('ignore:the load_module')  # the flag library's own way
def test_flags_reach_configs_within_tuples() -> None:
  """`rewards[0].weight` sets that entry; several flags, and a text, work as anywhere else."""
  names = flags.FlagValues()
  argv = [
    'train',
    '--config=configs/ppo.py',
    '--config.rollout.rewards[0].weight=2',
    '--config.rollout.rewards[0].gate_below=-0.5',
    '--config.rollout.rewards[0].source=task',
    '--config.reward_model.ensemble=("runs/a", "runs/b")',
  ]
  holder = config_flags.DEFINE_config_file('config', flag_values=names, sys_argv=argv)
  names(argv)
  config = holder.value
  assert config.rollout.rewards == (RewardConfig(source='task', weight=2.0, gate_below=-0.5),)
  assert config.reward_model.ensemble == ('runs/a', 'runs/b')
  config.validate()


@pytest.mark.parametrize(
  ('path', 'words'),
  [
    ('rollout.rewards[0].wieght', "RewardConfig has no 'wieght'; did you mean 'weight'"),
    ('rollout.rewards[1].weight', 'rewards has 1 entries'),
    ('rollout.rewards[x].weight', 'rewards has 1 entries'),
    ('rollout.rewardz[0].weight', "RolloutConfig has no 'rewardz'; did you mean 'rewards'"),
    ('steps[0]', 'steps has 0 entries'),
    ('objective.klee.target', "PPOConfig has no 'klee'"),
  ],
)
def test_a_path_that_leads_nowhere_is_named(path: str, words: str) -> None:
  """Wherever it goes wrong, also at an entry that is not there."""
  said = cli.unknown_field(['--config=configs/ppo.py', f'--config.{path}=1'])
  assert said is not None and said.startswith(f'--config.{path}: ') and words in said


def test_a_path_that_leads_somewhere_is_no_mistake() -> None:
  paths = ('rollout.rewards[0].weight', 'objective.kl.target', 'steps', 'reward_model.ensemble')
  for path in paths:
    assert cli.unknown_field(['--config=configs/ppo.py', f'--config.{path}=1']) is None


def test_none_is_a_value_of_what_may_have_none() -> None:
  """Numbers, and fields within tuples, too."""
  config = load_config('configs/rloo_brief.py')
  config.model.window = 3
  for path in ('model.window', 'rollout.rewards[1].clip_above', 'policy.init'):
    cli.set_none(config, path)
  assert config.model.window is config.rollout.rewards[1].clip_above is config.policy.init is None
  for path in ('seed', 'rollout.rewards[0].weight', 'name'):
    with pytest.raises(UserError, match=r'=None: it must have a value'):
      cli.set_none(config, path)


def test_what_follows_a_failed_checkpoint_is_not_shown() -> None:
  """The loop that orbax's other writes report to is closed; all other errors are shown."""
  shown: list[Any] = []
  hook = cli.hush_aftermath(shown.append)
  errors = (RuntimeError('Event loop is closed'), RuntimeError('else'), OSError('disk'))
  for error in errors:
    hook(SimpleNamespace(exc_value=error))
  assert [each.exc_value for each in shown] == list(errors[1:])


@pytest.mark.parametrize('flag', [[], ['--cache_dir=']], ids=['default', 'none'])
def test_compiled_programs_are_kept_at_home(flag: list[str], tmp_path: pathlib.Path) -> None:
  """Where neither a flag nor the environment names a folder; none is asked for by an empty name."""
  own = {name: value for name, value in os.environ.items() if not name.startswith('JAX_')}
  environment = {**own, 'JAX_PLATFORMS': 'cpu', 'HOME': str(tmp_path)}
  program = (
    'import jax; from experiments import cli; cli.run(lambda: int(jax.jit(lambda x: 2 * x)(0)))'
  )
  command = [sys.executable, '-c', program, *flag]
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  folder = tmp_path / '.cache' / 'rlhf_jax' / 'xla'
  assert (folder.is_dir() and any(folder.iterdir())) == (not flag)
