"""What is exported loads again, bit for bit, and says to transformers what it is."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors

from rlhf_jax.common import trees
from rlhf_jax.common.errors import CheckpointError
from rlhf_jax.data import tokenizers
from rlhf_jax.models import hf_export, hf_load
from rlhf_jax.models.hf_export import Assets
from rlhf_jax.models.hf_files import INDEX, SINGLE
from tests.golden.hf import cases
from tests.models import hf_golden
from tests.models.architectures import make_config, make_params

TEMPLATE = '{% for m in messages %}{{ m.content }} {% endfor %}'
WORDS = [f'word{number}' for number in range(cases.VOCAB - 4)]


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A tokenizer of 37 words, with a chat template."""
  folder = tmp_path_factory.mktemp('tokenizer')
  tokenizers.train('word', [' '.join(WORDS)], cases.VOCAB).save(folder)
  (folder / 'chat_template.jinja').write_text(TEMPLATE)
  return folder


def tensors(folder: Path) -> dict[str, np.ndarray]:
  """All tensors of a folder, and from how many files."""
  return {
    name: tensor
    for file in sorted(folder.glob('*.safetensors'))
    for name, tensor in safetensors.load_file(file).items()
  }


def config_of(folder: Path) -> dict[str, Any]:
  """The content of config.json."""
  return json.loads((folder / 'config.json').read_text())


def same_bits(first: Any, second: Any) -> None:
  """The leaves of two trees are equal."""
  others = trees.flatten(second)
  for name, leaf in trees.flatten(first).items():
    np.testing.assert_array_equal(leaf, others[name], err_msg=name)


@pytest.mark.parametrize('name', cases.CASES)
def test_round_trip(name: str, tokenizer: Path, tmp_path: Path) -> None:
  """Loaded and exported: the same tensors under the same names, in shards of a few KB."""
  golden = hf_golden.load(name)
  assets = Assets(tokenizer, golden.checkpoint.config)
  hf_export.export_policy(tmp_path / 'out', golden.model, golden.params, assets, shard_bytes=8_000)
  assert json.loads((tmp_path / 'out' / INDEX).read_text())['metadata']['total_size'] == sum(
    tensor.nbytes for tensor in tensors(tmp_path / 'out').values()
  )
  for file in (tmp_path / 'out').glob('*.safetensors'):
    own = safetensors.load_file(file)
    assert sum(tensor.nbytes for tensor in own.values()) <= 8_000 or len(own) == 1
  same_bits(tensors(hf_golden.FOLDER / name), tensors(tmp_path / 'out'))
  assert config_of(tmp_path / 'out') == config_of(hf_golden.FOLDER / name)


def test_what_a_run_was_trained_with_goes_first(tokenizer: Path, tmp_path: Path) -> None:
  """Its chat template and its stops, over those of the folder that it came from."""
  golden, own = hf_golden.load('llama2'), tmp_path / 'own'
  trained = dataclasses.replace(tokenizers.load(tokenizer), template='{{ 1 }}', stops=(5,))
  trained.save(own)
  generation = {'eos_token_id': 2, 'temperature': 0.6}
  assets = Assets(tokenizer, golden.checkpoint.config, generation)
  for name, its in (('from', assets), ('to', dataclasses.replace(assets, trained=own))):
    hf_export.export_policy(tmp_path / name, golden.model, golden.params, its)
  found = [
    json.loads((tmp_path / x / 'generation_config.json').read_text()) for x in ('from', 'to')
  ]
  assert found == [generation, generation | {'eos_token_id': [2, 5]}]
  templates = [(tmp_path / x / 'chat_template.jinja').read_text() for x in ('from', 'to')]
  assert templates == [TEMPLATE, '{{ 1 }}']


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_is_kept(dtype: str, tokenizer: Path, tmp_path: Path) -> None:
  """What was stored in 16 bits is stored in the same bits again."""
  golden = hf_golden.load('gpt_neox')
  export: dict[str, Any] = dict(assets=Assets(tokenizer, golden.checkpoint.config), dtype=dtype)
  hf_export.export_policy(tmp_path / 'once', golden.model, golden.params, **export)
  once = hf_load.open_checkpoint(tmp_path / 'once')
  params = hf_load.load_decoder(once, hf_golden.abstract_decoder(once.model))
  assert trees.flatten(params)['embedding'].dtype == np.float32
  hf_export.export_policy(tmp_path / 'twice', once.model, params, **export)
  assert config_of(tmp_path / 'twice')['dtype'] == dtype
  for name, tensor in tensors(tmp_path / 'twice').items():
    assert tensor.dtype == (ml_dtypes.bfloat16 if dtype == 'bfloat16' else np.float16)
    np.testing.assert_array_equal(tensor, tensors(tmp_path / 'once')[name])


def test_numbers_too_large_for_the_type(tokenizer: Path, tmp_path: Path) -> None:
  """They are refused rather than stored as infinity, and nothing is left behind."""
  golden = hf_golden.load('llama2')
  params = jax.tree.map(lambda x: x * 1e6, golden.params)
  with pytest.raises(CheckpointError, match='model.embed_tokens.weight.*largest of float16'):
    hf_export.export_policy(
      tmp_path / 'out', golden.model, params, Assets(tokenizer), dtype='float16'
    )
  assert not list(tmp_path.iterdir())


def test_a_decoder_of_our_own(tokenizer: Path, tmp_path: Path) -> None:
  """It gets the config of the first family that has it, special ids and all; added rows go."""
  import transformers

  model = make_config('llama3', vocab_size=cases.VOCAB, vocab_multiple=8)
  params = make_params(model)
  hf_export.export_policy(tmp_path / 'out', model, params, Assets(tokenizer))
  assert not (tmp_path / 'out' / INDEX).exists()
  assert tensors(tmp_path / 'out')['lm_head.weight'].shape == (37, 16)
  config = transformers.AutoConfig.from_pretrained(tmp_path / 'out')
  assert type(config).__name__ == 'LlamaConfig'
  assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
  assert config.rope_parameters['factor'] == 8.0
  generation = transformers.GenerationConfig.from_pretrained(tmp_path / 'out')
  assert generation.eos_token_id == 2
  loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  assert (
    loaded.encode('word3 word5', add_special_tokens=False)
    == (tokenizers.load(tokenizer).encode_batch(['word3 word5'])[0])
  )
  assert loaded.chat_template == TEMPLATE
  again = hf_load.open_checkpoint(tmp_path / 'out')
  abstract = hf_golden.abstract_decoder(again.model)
  found = trees.flatten(hf_load.load_decoder(again, abstract))
  for name, leaf in trees.flatten(params).items():
    own = leaf[:37] if name == 'embedding' else leaf[:, :37] if name == 'unembedding' else leaf
    np.testing.assert_array_equal(own, found[name])


@pytest.mark.parametrize('name', ['llama_scorer', 'gpt2_scorer'])
def test_reward_models(name: str, tokenizer: Path, tmp_path: Path) -> None:
  """The gain is in the weights, the bias in config.json; untouched ones keep their bits."""
  golden = hf_golden.load(name)
  assets = Assets(tokenizer, golden.checkpoint.config)
  hf_export.export_scorer(tmp_path / 'same', golden.model, golden.params, assets)
  same_bits(tensors(hf_golden.FOLDER / name), tensors(tmp_path / 'same'))
  head = golden.params['head'] | {'bias': np.full(1, 0.5, np.float32)}
  scaled = golden.params | {
    'head': head,
    'normalizer': {'gain': np.float32(3.0), 'bias': np.float32(-2.0)},
  }
  hf_export.export_scorer(tmp_path / 'out', golden.model, scaled, Assets(tokenizer))
  config = config_of(tmp_path / 'out')
  assert config['rlhf_jax'] == {'score_bias': -0.5}
  assert config['architectures'] == [golden.checkpoint.family.classifier]
  again = hf_load.open_checkpoint(tmp_path / 'out')
  assert again.scores and again.model.tied_embeddings
  found = hf_load.load_scorer(again, hf_golden.abstract_scorer(again.model))
  kernel = np.asarray(golden.params['head']['kernel']) * np.float32(3.0)
  np.testing.assert_array_equal(found['head']['kernel'], kernel)
  assert found['head']['bias'].tolist() == [-0.5]
  assert (found['normalizer']['gain'], found['normalizer']['bias']) == (1.0, 0.0)
  same_bits(golden.params['trunk'], found['trunk'])


def test_a_classifier_whose_padding_is_its_end(tokenizer: Path, tmp_path: Path) -> None:
  """transformers would read the score before the end: it is told of no padding at all."""
  golden = hf_golden.load('llama_scorer')
  config = dict(golden.checkpoint.config, pad_token_id=2, eos_token_id=2)
  assets = Assets(tokenizer, config)
  hf_export.export_scorer(tmp_path / 'out', golden.model, golden.params, assets)
  assert config_of(tmp_path / 'out')['pad_token_id'] is None


def test_another_config_than_the_decoder_has(tokenizer: Path, tmp_path: Path) -> None:
  """A template must describe the decoder; a folder in use is not written to."""
  golden = hf_golden.load('llama2')
  config = dict(golden.checkpoint.config, rms_norm_eps=0.1)
  with pytest.raises(CheckpointError, match='differs in norm_epsilon'):
    hf_export.export_policy(
      tmp_path / 'out', golden.model, golden.params, Assets(tokenizer, config)
    )
  with pytest.raises(CheckpointError, match='it is there already'):
    hf_export.export_policy(tokenizer, golden.model, golden.params, Assets(tokenizer))


def test_conversion_of_folders(tmp_path: Path) -> None:
  """Other shards lose nothing; another type is the nearest of each number."""
  source = hf_golden.FOLDER / 'qwen2'
  checkpoint = hf_load.open_checkpoint(source)
  hf_export.convert(checkpoint, tmp_path / 'shards', shard_bytes=5_000)
  assert len(list((tmp_path / 'shards').glob('*.safetensors'))) > 3
  same_bits(tensors(source), tensors(tmp_path / 'shards'))
  assert config_of(tmp_path / 'shards') == config_of(source)
  hf_export.convert(checkpoint, tmp_path / 'half', dtype='bfloat16')
  half = safetensors.load_file(tmp_path / 'half' / SINGLE)
  assert config_of(tmp_path / 'half')['dtype'] == 'bfloat16'
  for name, tensor in tensors(source).items():
    np.testing.assert_array_equal(half[name], tensor.astype(ml_dtypes.bfloat16))


def test_conversion_of_what_is_no_checkpoint(tmp_path: Path) -> None:
  """Tensors that its config does not have, or of other types, are named, and nothing is written."""
  shutil.copytree(hf_golden.FOLDER / 'llama_scorer', tmp_path / 'spoilt')
  hf_export.convert(hf_load.open_checkpoint(tmp_path / 'spoilt'), tmp_path / 'whole')
  spoilt = tensors(tmp_path / 'spoilt')
  del spoilt['model.norm.weight']
  spoilt['score.weight'] = spoilt['score.weight'].astype(np.float64)
  safetensors.save_file(spoilt, tmp_path / 'spoilt' / SINGLE)
  message = 'model.norm.weight is missing; score.weight is of type F64'
  with pytest.raises(CheckpointError, match=message):
    hf_export.convert(hf_load.open_checkpoint(tmp_path / 'spoilt'), tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
