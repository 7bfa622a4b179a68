"""Checkpoint folders stand where finished runs do, and runs that start from them go back."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from rlhf_jax import stages
from rlhf_jax.common import trees
from rlhf_jax.common.errors import CheckpointError, ConfigError, DataError, RunError, UserError
from rlhf_jax.config import InitConfig, RewardModelInitConfig
from rlhf_jax.data import templates, tokenizers
from rlhf_jax.feedback.dataset import Feedback, Split
from rlhf_jax.hf_folder import HfFolder, open_source
from rlhf_jax.models import adapters, decoder, hf_export, hf_load, hf_peft
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf_files import SINGLE
from rlhf_jax.models.roles import abstract_reward_model
from rlhf_jax.recipes.finished import open_run
from rlhf_jax.recipes.parts import Parts, abstract_decoder
from rlhf_jax.runs import ASSETS, Run
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh
from tests import tiny

GOLDEN = Path(__file__).resolve().parent / 'golden' / 'hf'
MESH = MeshConfig(data=1)
LORA = AdapterConfig(method='lora', rank=2, targets=('query', 'down'))
TEMPLATE = '{% for m in messages %}{{ m.content }} {% endfor %}'


@pytest.fixture(scope='module')
def folders(parents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The tiny policy and reward model as checkpoint folders `policy` and `scorer`."""
  out, mesh = tmp_path_factory.mktemp('folders'), make_mesh(MESH, jax.devices()[:1])
  run = Run(parents / 'sft')
  assets = hf_export.Assets(run.folder / 'tokenizer')
  params = run.restore_role('policy', abstract_decoder(run.model, mesh))
  hf_export.export_policy(out / 'policy', run.model, params, assets)
  (out / 'policy' / 'chat_template.jinja').write_text(TEMPLATE)
  run = Run(parents / 'reward_model')
  params = run.restore_role('reward_model', abstract_reward_model(run.model, mesh))
  hf_export.export_scorer(out / 'scorer', run.model, params, assets)
  return out


def config_of(case: str, folders: Path) -> Any:
  """A tiny stage of one step that starts from the folders."""
  config = tiny.make_config(case, folders, steps=1, model=ModelConfig())
  config.policy = InitConfig(init=str(folders / 'policy'))
  if config.reward_model.init is not None:
    config.reward_model = RewardModelInitConfig(init=str(folders / 'scorer'))
  return config


def write_adapter(folder: Path, base: HfFolder, matrices: Any) -> None:
  """Low-rank matrices as PEFT keeps them."""
  hf_peft.export_adapter(
    folder, base.opened.family, base.model, LORA, matrices, base=str(base.folder)
  )


def make_adapter(folder: Path, base: HfFolder) -> None:
  """Random ones in a new folder."""
  key, rng = jax.random.key(0), np.random.default_rng(0)
  abstract = jax.eval_shape(
    lambda: adapters.init(LORA, base.model, decoder.init(base.model, key), key)
  )
  folder.mkdir()
  draw = lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32)  # noqa: E731
  write_adapter(folder, base, jax.tree.map(draw, abstract))


def test_a_folder_has_what_the_run_had(folders: Path, parents: Path) -> None:
  """Decoder, parameters and tokenizer; the parameters of a reward model give the same scores."""
  mesh = make_mesh(MESH, jax.devices()[:1])
  source, run = open_source(folders / 'policy'), Run(parents / 'sft')
  assert isinstance(source, HfFolder) and type(open_source(parents / 'sft')) is Run
  assert source.tokenizer().fingerprint == run.tokenizer().fingerprint
  found = trees.flatten(source.restore_role('policy', abstract_decoder(source.model, mesh)))
  size = run.model.vocab_size
  for name, leaf in trees.flatten(
    run.restore_role('policy', abstract_decoder(run.model, mesh))
  ).items():
    own = found[name]
    if name == 'embedding':
      leaf, own = leaf[:size], own[:size]
    if name == 'unembedding':
      leaf, own = leaf[:, :size], own[:, :size]
    np.testing.assert_array_equal(own, leaf, err_msg=name)
  with pytest.raises(RunError, match='has no value head'):
    source.restore_role('value_head', None)
  with pytest.raises(RunError, match="'final' parameters only"):
    source.step('best')


@pytest.mark.slow
@pytest.mark.parametrize('case', ['dpo', 'rloo'])
def test_stages_start_from_folders(case: str, folders: Path, tmp_path: Path) -> None:
  """Pairs and rollouts; on a mesh whose tensor axis does not divide the vocabulary; and resumed."""
  config = config_of(case, folders)
  run = tiny.run_stage(config, tmp_path / case).outcome.run
  assert run.result is not None
  origin = run.parents()['policy']
  assert isinstance(origin, HfFolder) and origin.folder == folders / 'policy'
  assert (run.folder / ASSETS / 'chat_template.jinja').read_text() == TEMPLATE
  stage = stages.resolve(config, tmp_path)
  assert run.finished(stage.identity)


@pytest.mark.slow
def test_the_assets_go_on_to_the_next_stage(folders: Path, tmp_path: Path) -> None:
  """SFT from a folder, a reward model from that run: exported, both say what the folder said."""
  first = tiny.run_stage(config_of('sft', folders), tmp_path / 'sft').outcome.run
  config = config_of('reward_model', folders)
  config.policy = InitConfig(init=str(first.folder))
  second = tiny.run_stage(config, tmp_path / 'rm').outcome.run
  for run in (first, second):
    kept = json.loads((run.folder / ASSETS / 'config.json').read_text())
    assert kept == json.loads((folders / 'policy' / 'config.json').read_text())


def test_a_folder_is_asked_as_the_stage_says(folders: Path) -> None:
  """Computed and written to as that stage would; its architecture stays its own."""
  run, config = HfFolder(folders / 'policy'), tiny.make_config('sft')
  config.model = ModelConfig(width=4, dtype='bfloat16', vocab_chunk=8)
  config.data.chat_template = 'plain'
  mesh = make_mesh(MESH, jax.devices()[:1])
  nothing = Feedback('none', Split(), Split())
  parts = open_run(run, config, nothing, mesh, parents={}).parts
  assert isinstance(parts, Parts)
  assert parts.model == dataclasses.replace(run.model, dtype='bfloat16', vocab_chunk=8)
  assert parts.tokenizer.template == templates.named('plain', 'data.chat_template') != TEMPLATE
  config.data.chat_template = ''
  parts = open_run(run, config, nothing, mesh, parents={}).parts
  assert isinstance(parts, Parts) and parts.tokenizer.template == TEMPLATE


def test_a_folder_that_changes_is_another(folders: Path, tmp_path: Path) -> None:
  """One bit of the weights, the config or the tokenizer makes another parent."""
  copy = tmp_path / 'policy'
  shutil.copytree(folders / 'policy', copy)
  before = HfFolder(copy).params_identity('final')
  assert before == HfFolder(folders / 'policy').params_identity('final')
  content = bytearray((copy / SINGLE).read_bytes())
  content[-1] ^= 1
  (copy / SINGLE).write_bytes(content)
  changed = HfFolder(copy).params_identity('final')
  tokenizer = (copy / 'tokenizer_config.json').read_text()
  (copy / 'tokenizer_config.json').write_text(tokenizer + ' ')
  assert len({before, changed, HfFolder(copy).params_identity('final')}) == 3


def test_wrong_folders(folders: Path, tmp_path: Path) -> None:
  """A policy is no reward model; embeddings must hold all ids; nothing is nothing."""
  config = config_of('rloo', folders)
  config.reward_model = RewardModelInitConfig(init=str(folders / 'policy'))
  with pytest.raises(ConfigError, match=r'reward_model.init=.*expected what trains a reward model'):
    tiny.run_stage(config, tmp_path / 'out')
  config = config_of('sft', folders)
  config.policy = InitConfig(init=str(tmp_path / 'nothing'))
  with pytest.raises(ConfigError, match='a checkpoint folder .* or a config file'):
    stages.resolve(config, tmp_path)
  opened = HfFolder(folders / 'policy')
  small = dataclasses.replace(opened.opened.model, vocab_size=5)
  opened.opened = dataclasses.replace(opened.opened, model=small)
  with pytest.raises(CheckpointError, match='ids, and its model embeddings for 5'):
    opened.tokenizer()


def test_special_tokens_may_go_on_beyond_the_embeddings(tmp_path: Path) -> None:
  """As of Gemma 3 without pictures; texts with them are refused, in later stages too."""
  folder = Path(shutil.copytree(GOLDEN / 'gemma3', tmp_path / 'folder'))
  backend = tokenizers.train('word', [' '.join(f'w{number}' for number in range(33))], 64).backend
  backend.encode_special_tokens = False
  assert backend.get_vocab_size() == HfFolder(folder).model.vocab_size == 37
  backend.add_special_tokens(['<image_soft_token>'])
  backend.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text('{"eos_token": "<eos>", "pad_token": "<pad>"}')
  opened = HfFolder(folder).tokenizer()
  opened.save(tmp_path / 'run')
  for tokenizer in (opened, tokenizers.load(tmp_path / 'run')):
    assert tokenizer.fingerprint == opened.fingerprint
    (row,) = tokenizer.encode_batch(['w1 w2'])
    assert len(row) == 2 and max(row) < 37
    for encode in (
      tokenizer.encode_batch,
      tokenizer.encode_with_starts,
      tokenizer.encode_rendered,
    ):
      with pytest.raises(DataError, match=r"'w1 <image.*the token '<image_soft_token>' \(id 37\)"):
        encode(['w2', 'w1 <image_soft_token>'])
  written = tmp_path / 'run' / 'tokenizer_config.json'
  written.write_text(written.read_text().replace('37', '"37"'))
  with pytest.raises(DataError, match="embedded_ids='37': expected a number"):
    tokenizers.load(tmp_path / 'run')
  backend.add_tokens(['w34'])
  backend.save(str(folder / 'tokenizer.json'))
  with pytest.raises(CheckpointError, match='has 39 ids, and its model embeddings for 37'):
    HfFolder(folder).tokenizer()


def test_a_folder_that_does_not_say_what_it_is(folders: Path, tmp_path: Path) -> None:
  """It is no run either."""
  copy = Path(shutil.copytree(folders / 'policy', tmp_path / 'copy'))
  config = json.loads((copy / 'config.json').read_text())
  del config['model_type']
  (copy / 'config.json').write_text(json.dumps(config))
  with pytest.raises(CheckpointError, match='config.json: model_type=None: expected one of llama'):
    open_source(copy)


def test_code_of_a_folder_is_refused_and_never_run(folders: Path, tmp_path: Path) -> None:
  """An architecture or a tokenizer of its own, whatever beside it looks known; other code lies."""
  copy = tmp_path / 'policy'
  shutil.copytree(folders / 'policy', copy)
  (copy / 'own.py').write_text('import pathlib\npathlib.Path(__file__).with_name("ran").touch()\n')
  config = config_of('sft', folders)
  config.policy = InitConfig(init=str(copy))
  HfFolder(copy).tokenizer()  # which nothing asks to run it
  for name, auto in (('tokenizer_config', 'AutoTokenizer'), ('config', 'AutoModelForCausalLM')):
    path = copy / f'{name}.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'auto_map': {auto: 'own.X'}}))
    with pytest.raises(UserError, match=rf'{name}.json: .*own\.X.*') as caught:
      tiny.run_stage(config, tmp_path / 'run')
    assert 'code' in str(caught.value)
  assert not (copy / 'ran').exists() and not (tmp_path / 'run').exists()


def test_half_precision_judges_compute_in_it(folders: Path, tmp_path: Path) -> None:
  """A reward model stored in bfloat16; a policy computes as its stage asks."""
  for name, dtype in (('scorer', 'bfloat16'), ('policy', 'float32')):
    opened = hf_load.open_checkpoint(folders / name)
    hf_export.convert(opened, tmp_path / name, dtype='bfloat16')
    assert HfFolder(tmp_path / name).model.dtype == dtype


def test_constants_have_no_say_in_the_type_of_weights(tmp_path: Path) -> None:
  """Old files of Pythia hold masks and frequencies beside weights of 16 bits."""
  half = tmp_path / 'half'
  hf_export.convert(hf_load.open_checkpoint(GOLDEN / 'gpt_neox'), half, dtype='float16')
  kept = safetensors.load_file(half / SINGLE)
  attention = 'gpt_neox.layers.0.attention'
  kept[f'{attention}.bias'] = np.ones((1, 1, 12, 12), bool)
  kept[f'{attention}.masked_bias'] = np.zeros((), np.float32)
  kept[f'{attention}.rotary_emb.inv_freq'] = np.ones(2, np.float32)
  safetensors.save_file(kept, half / SINGLE)
  assert HfFolder(half).stored_dtype == 'float16'
  kept['gpt_neox.final_layer_norm.bias'] = kept['gpt_neox.final_layer_norm.bias'].astype(np.float32)
  safetensors.save_file(kept, half / SINGLE)
  assert HfFolder(half).stored_dtype == 'float32'


def test_the_tokenizer_beside_an_adapter_goes_first(folders: Path, tmp_path: Path) -> None:
  """As trainers leave it there, with a chat template of its own; the base's stops go on to hold."""
  base, adapter = HfFolder(shutil.copytree(folders / 'policy', tmp_path / 'base')), tmp_path / 'own'
  make_adapter(adapter, base)
  source = open_source(adapter)
  assert isinstance(source, HfFolder) and source.tokenizer_folder == base.folder
  (base.folder / 'generation_config.json').write_text('{"eos_token_id": [2, 7]}')
  plain, before = source.tokenizer(), source.params_identity('final')
  assert plain.template == TEMPLATE and plain.stop_ids == (2, 7)
  dataclasses.replace(plain, template='{{ 1 }}', stops=()).save(adapter)
  found = source.tokenizer()
  assert found.template == '{{ 1 }}' and found.stop_ids == (2, 7)
  assert source.params_identity('final') != before
  before = source.params_identity('final')
  (adapter / 'generation_config.json').write_text('{"eos_token_id": [2, 9]}')
  assert source.tokenizer().stop_ids == (2, 9, 7) and source.params_identity('final') != before
  source.save_assets(tmp_path)
  assert (tmp_path / ASSETS / 'chat_template.jinja').read_text() == '{{ 1 }}'
  assert json.loads((tmp_path / ASSETS / 'config.json').read_text())['model_type'] == 'llama'


@pytest.mark.slow
def test_a_run_that_starts_from_an_adapter_keeps_it(folders: Path, tmp_path: Path) -> None:
  """Base, adapter and what was trained on them; what lies there later must be the same."""
  adapter, base = tmp_path / 'adapter', HfFolder(folders / 'policy')
  make_adapter(adapter, base)
  config = LORA
  stage = config_of('sft', folders)
  stage.policy, stage.adapter = InitConfig(init=str(adapter)), config
  with tiny.devices(1):
    stages.run_stage(stage, tmp_path / 'run', root=tmp_path)
  run, mesh = Run(tmp_path / 'run'), make_mesh(MESH, jax.devices()[:1])
  assert run.parents()['policy'].source == adapter
  found = run.restore_role('policy', abstract_decoder(run.model, mesh))
  start = open_source(adapter).restore_role('policy', abstract_decoder(run.model, mesh))
  own = run.restore_adapter(mesh)
  expected = adapters.merge(
    run.model, adapters.join(adapters.frozen_of(config, run.model, start), own)
  )
  leaves = trees.flatten(expected)
  for name, leaf in trees.flatten(found).items():
    np.testing.assert_allclose(leaf, leaves[name], atol=1e-6, err_msg=name)
  write_adapter(adapter, base, own)
  with pytest.raises(RunError, match='other parameters lie now'):
    run.restore_role('policy', abstract_decoder(run.model, mesh))


def test_a_model_of_another_kind_is_found_before_others_are_trained(
  folders: Path, tmp_path: Path
) -> None:
  """A scorer as the policy, beside a reward model that would have to be trained first."""
  config = config_of('ppo', folders)
  config.policy = InitConfig(init=str(folders / 'scorer'))
  config.reward_model = RewardModelInitConfig(init='configs/reward_model.py')
  with pytest.raises(ConfigError, match='policy.init'), tiny.devices(1):
    stages.run_stage(config, tmp_path / 'run', root=tmp_path)
  assert not list(tmp_path.glob('stages/*'))
