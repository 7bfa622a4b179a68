"""LoRA adapters of PEFT: what they make of a decoder, and ours written as theirs."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common import trees
from rlhf_jax.common.errors import CheckpointError
from rlhf_jax.hf_folder import PeftFolder, open_source
from rlhf_jax.models import adapters, hf_peft
from rlhf_jax.models.adapters import AdapterConfig
from tests.golden.hf.make_peft import ADAPTERS, HERE
from tests.models import hf_golden
from tests.models.architectures import run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
  """An adapter that names its base by a path of its own."""
  shutil.copytree(HERE / 'peft_llama3', tmp_path / 'adapter')
  change(tmp_path / 'adapter', base_model_name_or_path=str(HERE / 'llama3'))
  return tmp_path / 'adapter'


def change(folder: Path, **changes: Any) -> None:
  """Sets keys of adapter_config.json."""
  path = folder / hf_peft.ADAPTER_CONFIG
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def copied(golden: hf_golden.Golden) -> Any:
  """Its parameters, to be used up."""
  return jax.tree.map(jnp.copy, golden.params)


@pytest.mark.parametrize('name', ADAPTERS)
def test_a_decoder_with_an_adapter_is_pefts(name: str) -> None:
  """Logits of PEFT: fused and separate maps, ranks of their own, rsLoRA, GPT-2's layout."""
  golden = hf_golden.load(name)
  adapter = hf_peft.open_adapter(HERE / f'peft_{name}')
  base = copied(golden)
  tokens, mask = (jnp.asarray(golden.expected[key][0]) for key in ('tokens', 'mask'))
  before = run(golden.checkpoint.model, base, tokens, mask)
  params = hf_peft.add_adapter(adapter, golden.checkpoint, base)
  found = run(golden.checkpoint.model, params, tokens, mask)
  expected = np.load(HERE / f'peft_{name}' / 'expected.npz')['logits']
  real = np.asarray(mask)
  np.testing.assert_allclose(np.asarray(found)[real], expected[real], atol=1e-5)
  assert np.abs(np.asarray(before)[real] - expected[real]).max() > 0.1


@pytest.mark.parametrize('targets', [('query', 'value'), ('query', 'key', 'value', 'out', 'down')])
@pytest.mark.parametrize('name', ['llama3', 'gpt2', 'gpt_neox', 'gemma2'])
def test_ours_as_theirs_and_back(name: str, targets: tuple[str, ...], tmp_path: Path) -> None:
  """Written in PEFT's format and merged from it: W + (alpha / rank) A B, as merged by ourselves."""
  golden = hf_golden.load(name)
  model, family = golden.checkpoint.model, golden.checkpoint.family
  config = AdapterConfig(method='lora', rank=2, alpha=3.0, targets=targets)
  base = copied(golden)
  rng = np.random.default_rng(0)
  trained = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
    jax.eval_shape(lambda base: adapters.init(config, model, base, jax.random.key(0)), base),
  )
  hf_peft.export_adapter(tmp_path, family, model, config, trained, base='owner/name')
  joined = adapters.join(adapters.frozen_of(config, model, base), trained)
  expected = trees.flatten(jax.device_get(adapters.merge(model, joined)))
  adapter = hf_peft.open_adapter(tmp_path)
  assert adapter.base == 'hf:owner/name' and adapter.config['fan_in_fan_out'] == (name == 'gpt2')
  for leaf, found in trees.flatten(hf_peft.add_adapter(adapter, golden.checkpoint, base)).items():
    np.testing.assert_allclose(found, expected[leaf], atol=1e-5, err_msg=leaf)


def test_a_folder_stands_for_a_run(folder: Path) -> None:
  """Its parameters are the merged ones, and its identity covers base and adapter."""
  source = open_source(folder)
  assert isinstance(source, PeftFolder)
  golden = hf_golden.load('llama3')
  found = source.restore_role('policy', hf_golden.abstract_decoder(source.opened.model))
  merged = hf_peft.add_adapter(source.adapter, golden.checkpoint, copied(golden))
  expected = trees.flatten(merged)
  for name, leaf in trees.flatten(found).items():
    np.testing.assert_array_equal(leaf, expected[name])
  first = source.params_identity('final')
  change(folder, lora_alpha=7)
  assert open_source(folder).params_identity('final') != first


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'peft_type': 'IA3'}, "peft_type='IA3': expected 'LORA'"),
    ({'use_dora': True}, 'use_dora=True is not supported'),
    ({'bias': 'all'}, "bias='all' is not supported, only 'none'"),
    ({'modules_to_save': ['lm_head']}, 'modules_to_save'),
    ({'base_model_name_or_path': ''}, 'base_model_name_or_path is empty'),
  ],
)
def test_what_the_decoder_lacks_is_refused(
  changes: dict[str, Any], said: str, folder: Path
) -> None:
  change(folder, **changes)
  with pytest.raises(CheckpointError, match=said):
    hf_peft.open_adapter(folder)


def test_damaged_folders_and_other_bases_are_refused(folder: Path) -> None:
  """Each message names the file or the map."""
  adapter = hf_peft.open_adapter(folder)
  gpt2, llama2 = hf_golden.load('gpt2'), hf_golden.load('llama2')
  with pytest.raises(CheckpointError, match='is no linear map in a block of'):
    hf_peft.add_adapter(adapter, gpt2.checkpoint, copied(gpt2))
  with pytest.raises(CheckpointError, match=r'has matrices \[.*\] and \[.*\], expected'):
    hf_peft.add_adapter(adapter, llama2.checkpoint, copied(llama2))
  (folder / hf_peft.ADAPTER).unlink()
  with pytest.raises(CheckpointError, match='there is no adapter_model.safetensors'):
    hf_peft.open_adapter(folder)
  (folder / hf_peft.ADAPTER_CONFIG).write_text('{')
  with pytest.raises(CheckpointError, match='damaged'):
    hf_peft.open_adapter(folder)
