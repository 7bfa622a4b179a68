"""LoRA adapters of PEFT: what they make of a decoder, and ours written as theirs."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from rlhf_jax.common import trees
from rlhf_jax.common.errors import CheckpointError, DataError
from rlhf_jax.common.types import Sequences
from rlhf_jax.hf_folder import PeftFolder, open_source
from rlhf_jax.models import adapters, decoder, hf_export, hf_peft, roles
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.hf_load import load_scorer, open_checkpoint
from rlhf_jax.objectives.reward_model import RewardModelConfig
from tests.golden.hf.make_peft import ADAPTERS, HERE, SCORERS
from tests.models import hf_golden
from tests.models.architectures import run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
  """An adapter that names its base by a path of its own."""
  return copy_of('peft_llama3', 'llama3', tmp_path)


def copy_of(name: str, base: str, tmp_path: Path) -> Path:
  """A copy of an adapter, to be spoilt, which names its base where that lies."""
  shutil.copytree(HERE / name, tmp_path / name)
  change(tmp_path / name, base_model_name_or_path=str(HERE / base))
  return tmp_path / name


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
  hf_peft.export_adapter(tmp_path, family, model, config, trained, base='hf:owner/name@v1')
  joined = adapters.join(adapters.frozen_of(config, model, base), trained)
  expected = trees.flatten(jax.device_get(adapters.merge(model, joined)))
  adapter = hf_peft.open_adapter(tmp_path)
  assert adapter.config['base_model_name_or_path'] == 'owner/name'
  assert adapter.base == 'hf:owner/name@v1' and adapter.config['fan_in_fan_out'] == (name == 'gpt2')
  for leaf, found in trees.flatten(hf_peft.add_adapter(adapter, golden.checkpoint, base)).items():
    np.testing.assert_allclose(found, expected[leaf], atol=1e-5, err_msg=leaf)


def test_the_first_pattern_that_matches_has_the_alpha(folder: Path) -> None:
  """As in PEFT, of a module's name or of its end; with rsLoRA over the root of the rank."""
  change(folder, lora_alpha=6, alpha_pattern={r'layers\.1\.self_attn\.o_proj': 3, 'o_proj': 5})
  adapter = hf_peft.open_adapter(folder)
  scales = [
    adapter.scale(f'model.layers.{layer}.self_attn.{name}_proj', 4)
    for layer, name in ((0, 'o'), (1, 'o'), (1, 'q'))
  ]
  assert scales == [5 / 4, 3 / 4, 6 / 4]
  change(folder, use_rslora=True)
  assert hf_peft.open_adapter(folder).scale('model.layers.0.self_attn.q_proj', 4) == 3


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


@pytest.mark.parametrize('name', SCORERS)
def test_a_reward_model_with_an_adapter_is_pefts(name: str, tmp_path: Path) -> None:
  """Scores of PEFT, on a language model or a classifier; alike from the files that we write."""
  source = open_source(copy_of(f'peft_scorer_{name}', name, tmp_path))
  assert isinstance(source, PeftFolder) and isinstance(source.config.objective, RewardModelConfig)
  model = source.opened.model
  params = source.restore_role('reward_model', hf_golden.abstract_scorer(model))
  inputs, expected = hf_golden.load(name).expected, HERE / f'peft_scorer_{name}' / 'expected.npz'
  tokens, mask = (jnp.asarray(inputs[key]) for key in ('tokens', 'mask'))
  whole = [
    Sequences(t[:, :4], m[:, :4], t[:, 4:], m[:, 4:]) for t, m in zip(tokens, mask, strict=True)
  ]
  score = jax.jit(lambda rows: roles.reward_score(model, params, rows))
  np.testing.assert_allclose(
    [score(rows) for rows in whole], np.load(expected)['scores'], atol=1e-5
  )
  with pytest.raises(CheckpointError, match='cannot write any'):
    source.restore_role('policy', hf_golden.abstract_decoder(model))


@pytest.mark.parametrize('name', SCORERS)
def test_scores_as_theirs_and_back(name: str, tmp_path: Path) -> None:
  """The head of a reward model: gain in the weights, as PEFT names them; the bias in our file."""
  checkpoint = open_checkpoint(HERE / name).as_scorer()
  model = checkpoint.model
  config = AdapterConfig(method='lora', rank=2, alpha=3.0, targets=('query', 'down'))
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(
    lambda key: adapters.init(config, model, decoder.init(model, key), key), jax.random.key(0)
  )
  trained = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
  kernel = rng.normal(size=(model.width, 1)).astype(np.float32)
  head = {'kernel': kernel, 'bias': np.full(1, 0.25, np.float32)}
  normalizer = {'gain': np.float32(2.0), 'bias': np.float32(-3.0)}
  score = hf_export.score_of({'head': head, 'normalizer': normalizer})
  hf_peft.export_adapter(
    tmp_path, checkpoint.family, model, config, trained, base=str(HERE / name), score=score
  )
  theirs = safetensors.load_file(tmp_path / hf_peft.ADAPTER)
  np.testing.assert_array_equal(theirs['base_model.model.score.weight'], 2 * kernel.T)
  said = json.loads((tmp_path / hf_peft.ADAPTER_CONFIG).read_text())
  assert (said['task_type'], said['modules_to_save']) == ('SEQ_CLS', ['score'])
  abstract = hf_golden.abstract_scorer(model)
  found = open_source(tmp_path).restore_role('reward_model', abstract)
  np.testing.assert_array_equal(found['head']['kernel'], 2 * kernel)
  assert found['head']['bias'].tolist() == [-2.5]
  base = load_scorer(checkpoint, abstract, score)['trunk']
  merged = adapters.merge(model, adapters.join(adapters.frozen_of(config, model, base), trained))
  expected = trees.flatten(merged)
  for leaf, own in trees.flatten(found['trunk']).items():
    np.testing.assert_allclose(own, expected[leaf], atol=1e-5, err_msg=leaf)
  first = open_source(tmp_path).params_identity('final')
  (tmp_path / hf_peft.OURS).write_text('{"score_bias": 1.0}')
  assert open_source(tmp_path).params_identity('final') != first


def test_a_reward_adapter_has_one_score(tmp_path: Path) -> None:
  """Not of three labels; none at all only on a base with one."""
  three = copy_of('peft_scorer_llama3', 'llama3', tmp_path)
  tensors = safetensors.load_file(three / hf_peft.ADAPTER)
  name = 'base_model.model.score.weight'
  safetensors.save_file(tensors | {name: np.zeros((3, 16), np.float32)}, three / hf_peft.ADAPTER)
  source = open_source(three)
  with pytest.raises(CheckpointError, match=r'is \[3, 16\], expected \[1, 16\].*num_labels=1'):
    source.restore_role('reward_model', hf_golden.abstract_scorer(source.model))
  change(three, modules_to_save=['score', 'lm_head'])
  with pytest.raises(CheckpointError, match='modules_to_save=.*lm_head.* is not supported'):
    open_source(three)
  for base, none in (('llama3', True), ('gpt2_scorer', False)):
    folder = copy_of(f'peft_scorer_{base}', base, tmp_path / 'without')
    tensors = safetensors.load_file(folder / hf_peft.ADAPTER)
    del tensors[name]
    safetensors.save_file(tensors, folder / hf_peft.ADAPTER)
    if none:
      with pytest.raises(CheckpointError, match=r"has none either.*modules_to_save=\['score'\]"):
        open_source(folder)
    else:
      own = open_source(folder)
      found = own.restore_role('reward_model', hf_golden.abstract_scorer(own.model))['head']
      np.testing.assert_array_equal(found['kernel'], hf_golden.load(base).params['head']['kernel'])


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'peft_type': 'IA3'}, "peft_type='IA3': expected 'LORA'"),
    ({'use_dora': True}, 'use_dora=True is not supported'),
    ({'bias': 'all'}, "bias='all' is not supported, only 'none'"),
    ({'modules_to_save': ['lm_head']}, 'modules_to_save'),
    ({'base_model_name_or_path': ''}, 'base_model_name_or_path is empty'),
    ({'lora_alpha': '16'}, "lora_alpha='16'.*expected a number"),
    ({'alpha_pattern': {'q_proj': None}}, 'alpha_pattern=.*expected a number'),
    ({'alpha_pattern': {'(': 2}}, 'numbers by regular expressions'),
  ],
)
def test_what_the_decoder_lacks_is_refused(
  changes: dict[str, Any], said: str, folder: Path
) -> None:
  change(folder, **changes)
  with pytest.raises(CheckpointError, match=said):
    hf_peft.open_adapter(folder)


def test_a_base_that_is_not_there_is_named(folder: Path) -> None:
  """A path of another machine is no name of the hub; what could be one is taken for it."""
  for path in ('/data/models/llama', '../llama', 'C:\\llama'):
    change(folder, base_model_name_or_path=path)
    with pytest.raises(CheckpointError, match=f'{hf_peft.ADAPTER_CONFIG}.*no such folder here'):
      open_source(folder)
  for name in ('gpt2', 'owner/a-name.v2'):
    change(folder, base_model_name_or_path=name, revision='main')
    assert hf_peft.open_adapter(folder).base == f'hf:{name}@main'
  change(folder, base_model_name_or_path=str(folder))
  with pytest.raises(CheckpointError, match=f'^{folder}: it needs the model it was trained on'):
    open_source(folder)


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
  for damaged in ('{', '[]'):
    (folder / hf_peft.ADAPTER_CONFIG).write_text(damaged)
    with pytest.raises(DataError, match=hf_peft.ADAPTER_CONFIG):
      hf_peft.open_adapter(folder)
