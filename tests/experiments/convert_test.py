"""The program that writes runs and folders as checkpoint folders, and those that take them."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from safetensors import numpy as safetensors

from experiments import cli, convert
from rlhf_jax.common import trees
from rlhf_jax.common.errors import UserError
from rlhf_jax.config import InitConfig
from rlhf_jax.hf_folder import HfFolder, PeftFolder, open_source
from rlhf_jax.models import adapters
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf_files import INDEX, SINGLE
from rlhf_jax.models.roles import abstract_reward_model
from rlhf_jax.recipes.parts import abstract_decoder
from rlhf_jax.runs import Run
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh
from tests import tiny
from tests.experiments.programs import message, run_program
from tests.hf_folder_test import make_adapter

pytestmark = pytest.mark.slow


def run(source: Path, target: Path, **given: Any) -> None:
  """`python -m experiments.convert` with flags, in this process."""
  with flagsaver.flagsaver(source=str(source), target=str(target), **given):
    assert convert.main() == cli.DONE


@pytest.fixture(scope='module')
def folders(parents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The SFT policy and the reward model, as `policy` and `scorer`."""
  out = tmp_path_factory.mktemp('folders')
  run(parents / 'sft', out / 'policy')
  run(parents / 'reward_model', out / 'scorer')
  return out


def samples(path: Path, *given: str) -> list[dict]:
  """The best of three samples of each prompt, as the sampling program writes them to a file."""
  prompts = ('--prompt=the soup was', '--prompt=we', '--prompt_length=4', '--max_new_tokens=5')
  settings = ('--best_of=3', '--temperature=0.7', f'--json={path}')
  done = run_program('sample', *prompts, *settings, *given)
  assert done.returncode == 0, done.stderr
  return json.loads(path.read_text())['samples']


def test_the_same_samples(parents: Path, folders: Path, tmp_path: Path) -> None:
  """Policy and judge sample and score the same from their runs and from their folders."""
  judge = f'--reward_model={parents / "reward_model"}'
  best = samples(tmp_path / 'run.json', f'--run={parents / "sft"}', judge)
  judge = f'--reward_model={folders / "scorer"}'
  again = samples(tmp_path / 'folder.json', f'--model={folders / "policy"}', judge)
  assert [row['tokens'] for row in best] == [row['tokens'] for row in again]
  first, second = ([row['score'] for row in rows] for rows in (best, again))
  np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)


def test_a_folder_reads_its_prompts_whole(folders: Path, tmp_path: Path) -> None:
  """Nothing says how much but its positions, which the prompt and the response share."""
  out = tmp_path / 'out.json'
  words = 'the soup was very good and we liked it'
  asked = ('sample', f'--model={folders / "policy"}', f'--prompt={words}', f'--json={out}')
  done = run_program(*asked)
  assert done.returncode == 0, done.stderr
  written = json.loads(out.read_text())
  positions = HfFolder(folders / 'policy').model.max_length
  assert written['settings']['max_new_tokens'] == min(128, positions // 2)
  assert written['settings']['prompt_length'] == positions - min(128, positions // 2)
  (row,) = written['samples']
  assert row['prompt_tokens_cut'] == 0 and len(row['prompt_tokens']) > len(words.split())
  said = message(run_program(*asked, f'--max_new_tokens={positions}'))
  assert f'--max_new_tokens={positions}: expected at most {positions - 2}' in said


def test_a_folder_is_asked_the_questions_of_a_config(folders: Path, tmp_path: Path) -> None:
  """Its data and evaluation; the folder's judge gives the proxy reward."""
  config = tmp_path / 'stage.py'
  config.write_text(
    'from tests import tiny\n\n\ndef get_config(arg=None):\n  return tiny.make_config("sft")\n'
  )
  given = ('evaluate', f'--model={folders / "policy"}', f'--config={config}')
  done = run_program(
    *given,
    '--prompts=8',
    '--records=4',
    f'--reference={folders / "policy"}',
    f'--reward_model={folders / "scorer"}',
    f'--json={tmp_path / "out.json"}',
  )
  assert done.returncode == 0, done.stderr
  written = json.loads((tmp_path / 'out.json').read_text())
  assert written['run'] == str(folders / 'policy') and written['data_fingerprint'] is None
  assert written['params_sha256'] == HfFolder(folders / 'policy').params_sha256
  kl = next(value for name, value in written['metrics'].items() if 'kl' in name)
  assert abs(kl['mean']) < 1e-5  # to itself
  assert any('reward' in name for name in written['metrics'])


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('generation.temperature', '-1'),
    ('evaluation.batch_size', '0'),
    ('model.dtype', 'float99'),
    ('model.vocab_chunk', '-3'),
    ('model.remat', 'some'),
    ('model.attention', 'flash'),
  ],
)
def test_a_folder_is_asked_what_a_stage_may_ask(
  field: str, value: str, folders: Path, tmp_path: Path
) -> None:
  """What training would refuse is refused, before anything is measured."""
  config = tmp_path / 'stage.py'
  config.write_text(
    'from tests import tiny\n\n\ndef get_config(arg=None):\n  return tiny.make_config("sft")\n'
  )
  given = (f'--model={folders / "policy"}', f'--config={config}', f'--config.{field}={value}')
  said = message(run_program('evaluate', *given, '--prompts=8', '--records=8'))
  assert field in said and value in said and 'expected' in said


def test_an_adapter_is_known_by_its_own_folder(folders: Path, tmp_path: Path) -> None:
  """Not by its base's; and nothing is written beside it, where a hub's cache may be."""
  adapter, out = tmp_path / 'there' / 'adapter', tmp_path / 'out.json'
  adapter.parent.mkdir()
  make_adapter(adapter, HfFolder(folders / 'policy'))
  done = run_program('sample', f'--model={adapter}', '--prompt=we', f'--json={out}')
  assert done.returncode == 0, done.stderr
  assert json.loads(out.read_text())['run'] == str(adapter)
  data, config = tmp_path / 'data.jsonl', tmp_path / 'stage.py'
  rows = [{'prompt': f'we {number}', 'response': 'the soup was good'} for number in range(40)]
  data.write_text(''.join(f'{json.dumps(row)}\n' for row in rows) + '{"prompt": 3}\n')
  config.write_text(
    'from tests import tiny\n\n\ndef get_config(arg=None):\n  return tiny.make_config("sft")\n'
  )
  given = ('evaluate', f'--model={adapter}', f'--config={config}', f'--reference={adapter}')
  source = ('--config.data.source=jsonl', f'--config.data.path={data}')
  asked = ('--prompts=0', '--records=2', f'--json={out}', '--config.data.on_error=quarantine')
  done = run_program(*given, *source, *asked)
  assert done.returncode == 0, done.stderr
  written = json.loads(out.read_text())
  assert written['run'] == written['reference'] == str(adapter)
  assert done.stdout.startswith(f'{adapter}: ')
  assert [path.name for path in adapter.parent.iterdir()] == ['adapter']
  assert list((tmp_path / 'quarantine').iterdir()) and not (folders / 'quarantine').exists()


def test_types_and_shards(folders: Path, tmp_path: Path) -> None:
  """A folder in another type, in files of at most 4 KB."""
  target = tmp_path / 'half'
  run(folders / 'policy', target, dtype='bfloat16', shard_gb=4e-6)
  assert (target / INDEX).is_file() and not (target / SINGLE).exists()
  assert (target / 'tokenizer.json').is_file() and (target / 'generation_config.json').is_file()
  for file in target.glob('*.safetensors'):
    assert all(t.dtype.name == 'bfloat16' for t in safetensors.load_file(file).values())


@pytest.mark.parametrize(
  ('kind', 'method'),
  [('shared', 'none'), ('separate', 'none'), ('reward_model', 'none'), ('reward_model', 'lora')],
)
def test_value_functions(kind: str, method: str, parents: Path, tmp_path: Path) -> None:
  """PPO's, on the trunk of its policy or one of their own: the numbers that training ended with."""
  config = tiny.make_config('ppo', parents, steps=1, adapter=AdapterConfig(method=method))
  config.objective = dataclasses.replace(config.objective, value_model=kind)
  ppo = tiny.run_stage(config, tmp_path / 'ppo')
  run(ppo.outcome.run.folder, tmp_path / 'value', role='value')
  value = HfFolder(tmp_path / 'value')
  assert value.opened.scores
  mesh, trained = make_mesh(MeshConfig(data=1), jax.devices()[:1]), ppo.loop.state.params
  trunk = trained['policy' if kind == 'shared' else 'value_trunk']
  if method == 'lora':
    judge, own = Run(parents / 'reward_model'), config.adapter
    whole = judge.restore_role('reward_model', abstract_reward_model(judge.model, mesh))
    frozen = adapters.frozen_of(own, judge.model, whole['trunk'])
    trunk = adapters.merge(judge.model, adapters.join(frozen, trunk))
  expected = trees.flatten({'trunk': trunk, 'head': trained['value_head']})
  found = trees.flatten(
    value.restore_role('reward_model', abstract_reward_model(value.model, mesh))
  )
  assert float(abs(expected['head.kernel']).max()) > 0 and float(abs(expected['head.bias'])[0]) > 0
  ids = value.model.vocab_size
  for name in expected.keys() - {'trunk.unembedding'}:
    first, second = expected[name], found[name]
    if name == 'trunk.embedding':  # behind it are rows that nothing reads
      first, second = first[:ids], second[:ids]
    np.testing.assert_allclose(second, first, rtol=1e-6, atol=1e-6, err_msg=name)
  if kind == 'shared':
    with pytest.raises(UserError, match='it is there already'):
      run(ppo.outcome.run.folder, tmp_path / 'value', role='value')


@pytest.mark.parametrize('case', ['sft', 'reward_model'])
def test_adapters(case: str, folders: Path, tmp_path: Path) -> None:
  """What a run trained beside a folder, as PEFT's files: read again it is the run, merged too."""
  role = 'policy' if case == 'sft' else case
  config = tiny.make_config(case, steps=2, model=ModelConfig())
  config.policy = InitConfig(init=str(folders / 'policy'))
  config.adapter = AdapterConfig(method='lora', rank=2, targets=('query', 'down'))
  trained = tiny.run_stage(config, tmp_path / 'run').outcome.run
  # As of a run with a chat template of its own, and a stop token that its start does not have.
  dataclasses.replace(trained.tokenizer(), template='{{ 1 }}', stops=(7,)).save(
    trained.folder / 'tokenizer'
  )
  run(trained.folder, tmp_path / 'adapter', adapter=True)
  run(tmp_path / 'adapter', tmp_path / 'whole')
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  make = abstract_decoder if case == 'sft' else abstract_reward_model
  expected = trees.flatten(trained.restore_role(role, make(trained.model, mesh)))
  if case != 'sft':
    gain, bias = (expected.pop(f'normalizer.{name}') for name in ('gain', 'bias'))
    expected['head.kernel'] *= gain
    expected['head.bias'] = gain * expected['head.bias'] + bias
  for name in ('adapter', 'whole'):
    source = open_source(tmp_path / name)
    assert isinstance(source, PeftFolder) == (name == 'adapter')
    tokenizer = source.tokenizer()
    assert tokenizer.fingerprint == trained.tokenizer().fingerprint
    assert tokenizer.template == '{{ 1 }}'
    if case == 'sft' or name == 'adapter':  # a whole classifier has no generation_config.json
      assert tokenizer.stop_ids == (tokenizer.eos_id, 7)
    found = trees.flatten(source.restore_role(role, make(source.model, mesh)))
    for leaf, values in expected.items():
      if leaf != 'trunk.unembedding':  # which no score is read from, and no folder keeps
        np.testing.assert_allclose(found[leaf], values, atol=1e-6, err_msg=leaf)
  with pytest.raises(UserError, match='in float32. Leave --role and --dtype out'):
    run(trained.folder, tmp_path / 'half', adapter=True, dtype='bfloat16')


@pytest.mark.parametrize(
  ('name', 'given', 'said'),
  [
    ('sft', dict(role='reward_model'), 'trained a policy'),
    ('sft', dict(role='value'), 'has no value function'),
    ('reward_model', dict(role='policy'), 'trained a reward model'),
    ('sft', dict(adapter=True), 'trained no low-rank matrices'),
    ('nothing', {}, 'not a run directory'),
  ],
)
def test_mistakes(
  name: str, given: dict[str, Any], said: str, parents: Path, tmp_path: Path
) -> None:
  """The message says what is wrong, and nothing is written."""
  with pytest.raises(UserError, match=said):
    run(parents / name, tmp_path / 'out', **given)
  assert not (tmp_path / 'out').exists()


def test_a_folder_has_one_model(folders: Path, tmp_path: Path) -> None:
  """Roles and checkpoints are those of runs."""
  target = f'--target={tmp_path / "out"}'
  done = run_program('convert', f'--source={folders / "policy"}', target, '--role=policy')
  assert re.search('--role=policy: .* has one model', message(done), re.DOTALL)


def test_a_run_or_a_model(folders: Path) -> None:
  """Programs that take either take one."""
  assert isinstance(cli.run_or_model(None, str(folders / 'policy')), HfFolder)
  for both in ((None, None), ('runs/a', str(folders / 'policy'))):
    with pytest.raises(UserError, match='give one of them'):
      cli.run_or_model(*both)
