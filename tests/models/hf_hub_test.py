"""Names of the hub: config and tokenizer come at once, tensors when they are read."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import numpy as safetensors

from rlhf_jax import stages
from rlhf_jax.common import trees
from rlhf_jax.common.errors import CheckpointError
from rlhf_jax.config import InitConfig, RewardModelInitConfig
from rlhf_jax.data import tokenizers
from rlhf_jax.hf_folder import HfFolder, PeftFolder, open_source
from rlhf_jax.models import hf_hub, hf_load
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf_files import INDEX, SINGLE
from rlhf_jax.planning.stage import plan_stage
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh
from tests import tiny
from tests.models import hf_golden
from tests.models.hf_hub import COMMIT, Hub

LLAMA = hf_golden.FOLDER / 'llama2'


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
  """A hub with a policy in one file."""
  hub = Hub(tmp_path, monkeypatch)
  hub.add('owner/policy', LLAMA)
  return hub


def load(source: str) -> Any:
  """The policy of a source."""
  checkpoint = hf_load.open_checkpoint(source)
  return hf_load.load_decoder(checkpoint, hf_golden.abstract_decoder(checkpoint.model))


def test_tensors_are_downloaded_when_they_are_read(hub: Hub) -> None:
  """Of the commit whose config was read; not the authors' copies of the same weights."""
  for name in ('consolidated.safetensors', 'original/model.safetensors', 'pytorch_model.bin'):
    path = hub.remote / 'owner/policy' / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b'')
  checkpoint = hf_load.open_checkpoint('hf:owner/policy@v1')
  assert hub.downloaded('owner/policy') == {'config.json'} and hub.revisions == ['v1']
  assert hf_load.is_checkpoint('hf:owner/policy@v1')
  assert hf_hub.name_of(checkpoint.folder) == f'hf:owner/policy@{COMMIT}'
  assert hf_hub.name_of(LLAMA) is None
  params = hf_load.load_decoder(checkpoint, hf_golden.abstract_decoder(checkpoint.model))
  assert hub.downloaded('owner/policy') == {'config.json', SINGLE}
  assert set(hub.revisions[1:]) == {COMMIT}
  expected = trees.flatten(hf_golden.load('llama2').params)
  for name, leaf in trees.flatten(params).items():
    np.testing.assert_array_equal(leaf, expected[name])


def test_shards_are_those_of_the_index(hub: Hub) -> None:
  """Another copy in other files stays where it is."""
  folder = hub.remote / 'owner/policy'
  whole = safetensors.load_file(folder / SINGLE)
  (folder / SINGLE).rename(folder / 'model.fp16.safetensors')
  names = sorted(whole)
  files = {'a.safetensors': names[::2], 'b.safetensors': names[1::2]}
  for file, inside in files.items():
    safetensors.save_file({name: whole[name] for name in inside}, folder / file)
  weight_map = {name: file for file, inside in files.items() for name in inside}
  (folder / INDEX).write_text(json.dumps({'weight_map': weight_map}))
  load('hf:owner/policy')
  assert hub.downloaded('owner/policy') == {'config.json', INDEX, *files}


def test_what_is_here_needs_no_network(hub: Hub) -> None:
  """A second program finds all of it; without a network and a copy the message says what to do."""
  load('hf:owner/policy')
  hub.reachable = False
  load('hf:owner/policy')
  shutil.rmtree(hub.local)
  with pytest.raises(CheckpointError, match='hf:owner/other: .*no route to host.*name its folder'):
    hf_load.open_checkpoint('hf:owner/other')
  hub.reachable = True
  checkpoint = hf_load.open_checkpoint('hf:owner/policy@v2')
  hub.reachable = False
  with pytest.raises(CheckpointError, match='no route to host'):
    _ = checkpoint.headers


@pytest.mark.parametrize(
  ('name', 'said'),
  [
    ('pytorch_model.bin', r'hf:owner/policy: it has pytorch_model.bin but no .*save_pretrained'),
    ('model.pt', r'hf:owner/policy: it has model.pt but no .*save_pretrained'),
    ('model.gguf', 'hf:owner/policy: there is neither model.safetensors nor'),
  ],
)
def test_other_files_are_refused_before_they_are_downloaded(
  name: str, said: str, hub: Hub, tmp_path: Path
) -> None:
  """Also before a stage runs those that it starts from; a folder is refused alike."""
  folder = hub.remote / 'owner/policy'
  (folder / SINGLE).rename(folder / name)
  with pytest.raises(CheckpointError, match=said):
    load('hf:owner/policy')
  with pytest.raises(CheckpointError, match=said.replace('hf:owner/policy', str(folder))):
    load(str(folder))
  assert hub.downloaded('owner/policy') == {'config.json'}
  config = tiny.make_config('rloo', model=ModelConfig())
  config.policy = InitConfig(init='hf:owner/policy')
  config.reward_model = RewardModelInitConfig(init='configs/reward_model.py')
  with pytest.raises(CheckpointError, match=said):
    stages.run_stage(config, tmp_path / 'run', root=tmp_path)
  assert not (tmp_path / 'stages').exists()


def test_plans_download_no_tensors(hub: Hub) -> None:
  """Decoders are in config.json; that the two have one tokenizer is seen from small files."""
  hub.add('owner/scorer', hf_golden.FOLDER / 'llama_scorer')
  for name in ('owner/policy', 'owner/scorer'):
    tokenizers.train('word', ['a b'], 10).save(hub.remote / name)
  config = tiny.make_config('ppo', mesh=MeshConfig(data=2, fsdp=2, tensor=2), model=ModelConfig())
  config.policy = InitConfig(init='hf:owner/policy')
  config.reward_model = RewardModelInitConfig(init='hf:owner/scorer')
  stage = plan_stage(config, make_mesh(config.mesh), 0)
  assert set(stage.frozen()) == {'reference', 'reward_model'}
  for name, golden in (('owner/policy', 'llama2'), ('owner/scorer', 'llama_scorer')):
    assert hub.downloaded(name) == {'config.json', 'tokenizer.json', 'tokenizer_config.json'}
    assert stage.model.width == hf_golden.load(golden).model.width


def test_adapters_of_the_hub(hub: Hub) -> None:
  """They are found by their config, and their base on the hub by its name and revision."""
  hub.add('owner/base', hf_golden.FOLDER / 'llama3')
  adapter = hub.add('owner/adapter', hf_golden.FOLDER / 'peft_llama3') / 'adapter_config.json'
  named = dict(base_model_name_or_path='owner/base', revision='v3')
  adapter.write_text(json.dumps(json.loads(adapter.read_text()) | named))
  source = open_source('hf:owner/adapter')
  assert isinstance(source, PeftFolder) and source.adapter.base == 'hf:owner/base@v3'
  assert 'v3' in hub.revisions and hub.downloaded('owner/base') == {'config.json'}
  source.restore_role('policy', hf_golden.abstract_decoder(source.opened.model))
  assert SINGLE in hub.downloaded('owner/base')
  assert type(open_source('hf:owner/base')) is HfFolder
