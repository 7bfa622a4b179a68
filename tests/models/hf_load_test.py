"""Checkpoint folders: shards, types, shardings, memory, and what is wrong with them."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from rlhf_jax.common import trees
from rlhf_jax.common.errors import CheckpointError
from rlhf_jax.models import decoder, hf_export, hf_layout, hf_load, hf_model, hf_place
from rlhf_jax.models.hf_files import INDEX, SINGLE
from rlhf_jax.recipes.parts import abstract_decoder
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh
from rlhf_jax.sharding.rules import param_shardings
from tests.models import hf_golden

LLAMA = hf_golden.FOLDER / 'llama2'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
  """A copy of a checkpoint, to be spoilt."""
  shutil.copytree(LLAMA, tmp_path / 'llama')
  return tmp_path / 'llama'


def load(folder: Path) -> Any:
  """The policy in a folder."""
  checkpoint = hf_load.open_checkpoint(folder)
  return hf_load.load_decoder(checkpoint, hf_golden.abstract_decoder(checkpoint.model))


def tensors(folder: Path) -> dict[str, np.ndarray]:
  """All tensors of a folder with one file."""
  return safetensors.load_file(folder / SINGLE)


def change_config(folder: Path, **changes: Any) -> None:
  """Sets keys of config.json."""
  path = folder / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize('block', [hf_place._BLOCK, 50])
def test_parameters_lie_where_they_should(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
  """On a mesh of eight devices, each holds its part, and the parts are those of one device.

  So they are if a table comes in blocks, of which the last overlaps the one before it.
  """
  monkeypatch.setattr(hf_place, '_BLOCK', block)
  golden = hf_golden.load('llama3')
  model = dataclasses.replace(golden.model, vocab_multiple=4)
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  abstract = hf_golden.abstract_decoder(model)
  shardings = param_shardings(decoder.logical_axes(model), abstract, mesh)
  placed = jax.tree.map(
    lambda leaf, by: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by), abstract, shardings
  )
  found = trees.flatten(hf_load.load_decoder(golden.checkpoint, placed))
  where = trees.flatten(shardings)
  for name, leaf in trees.flatten(golden.params).items():
    assert found[name].sharding.is_equivalent_to(where[name], leaf.ndim), name
    assert found[name].dtype == np.float32
    own = np.asarray(found[name])
    if name == 'embedding':
      assert own.shape == (40, 16) and not own[37:].any()
      own = own[:37]
    np.testing.assert_array_equal(own, leaf, err_msg=name)


def test_shards_and_half_precision(folder: Path) -> None:
  """Shards that an index names; numbers of 16 bits become float32 without a change."""
  import ml_dtypes

  whole = tensors(folder)
  types = (ml_dtypes.bfloat16, np.float16, np.float32)
  kept = {name: t.astype(types[i % 3]) for i, (name, t) in enumerate(sorted(whole.items()))}
  names = sorted(kept)
  files = {'a.safetensors': names[::2], 'b.safetensors': names[1::2]}
  for file, inside in files.items():
    safetensors.save_file({name: kept[name] for name in inside}, folder / file)
  weight_map = {name: file for file, inside in files.items() for name in inside}
  (folder / INDEX).write_text(json.dumps({'weight_map': weight_map}))
  (folder / SINGLE).unlink()
  found = load(folder)
  np.testing.assert_array_equal(found['unembedding'], kept['lm_head.weight'].astype(np.float32).T)
  up = [kept[f'model.layers.{i}.mlp.up_proj.weight'].astype(np.float32).T for i in range(2)]
  np.testing.assert_array_equal(found['layers']['mlp']['up']['kernel'], np.stack(up))
  (folder / 'b.safetensors').unlink()
  with pytest.raises(CheckpointError, match='names b.safetensors, which .* does not hold'):
    load(folder)


def test_names_of_the_trunk_alone_and_constants(tmp_path: Path) -> None:
  """GPT-2's own files leave the prefix out, and hold masks of the attention."""
  shutil.copytree(hf_golden.FOLDER / 'gpt2', tmp_path / 'gpt2')
  plain = {name.removeprefix('transformer.'): t for name, t in tensors(tmp_path / 'gpt2').items()}
  plain['h.0.attn.bias'] = np.ones((1, 1, 12, 12), np.float32)
  plain['lm_head.weight'] = plain['wte.weight']
  safetensors.save_file(plain, tmp_path / 'gpt2' / SINGLE)
  expected = trees.flatten(hf_golden.load('gpt2').params)
  for name, leaf in trees.flatten(load(tmp_path / 'gpt2')).items():
    np.testing.assert_array_equal(leaf, expected[name])
  plain['lm_head.weight'] = plain['wte.weight'] + 1
  safetensors.save_file(plain, tmp_path / 'gpt2' / SINGLE)
  with pytest.raises(CheckpointError, match='lm_head.weight is not equal to wte.weight'):
    load(tmp_path / 'gpt2')


@pytest.mark.parametrize('trunk', ['language_model.model.', 'model.language_model.'])
def test_of_a_model_that_reads_pictures_the_text_part_is_read(
  tmp_path: Path, trunk: str, caplog: pytest.LogCaptureFixture
) -> None:
  """Under either name of its tensors; what is written of it is a model of text."""
  golden = hf_golden.load('gemma3')
  text, whole = hf_golden.FOLDER / 'gemma3', tmp_path / 'whole'
  whole.mkdir()
  parts = {name.replace('model.', trunk, 1): t for name, t in tensors(text).items()}
  tower = {
    f'{start}{part}': np.zeros(2, np.float32)
    for start in ('', 'model.')
    for part in ('vision_tower.head.probe', 'multi_modal_projector.mm_input_projection_weight')
  }
  safetensors.save_file(parts | tower, whole / SINGLE)
  inner = json.loads((text / 'config.json').read_text())
  outer = dict(
    model_type='gemma3',
    architectures=['Gemma3ForConditionalGeneration'],
    eos_token_id=[1, 5],
    vision_config={},
  )
  (whole / 'config.json').write_text(json.dumps(outer | {'text_config': inner}))
  for _ in range(2):
    assert hf_load.open_checkpoint(whole).model == golden.model
  assert caplog.text.count('only its text part is read') == 1
  hf_export.convert(hf_load.open_checkpoint(whole), tmp_path / 'again')
  for folder in (whole, tmp_path / 'again'):
    for name, leaf in trees.flatten(load(folder)).items():
      np.testing.assert_array_equal(leaf, trees.flatten(golden.params)[name], err_msg=name)
  written = json.loads((tmp_path / 'again' / 'config.json').read_text())
  assert written['model_type'] == 'gemma3_text' and written['eos_token_id'] == [1, 5]
  assert written['architectures'] == ['Gemma3ForCausalLM']
  assert tensors(tmp_path / 'again').keys() == tensors(text).keys()
  assets = hf_export.read_assets(whole)  # of a run that started from it
  assert hf_export.family_of(tmp_path, golden.model, assets).model_type == 'gemma3_text'
  change_config(whole, quantization_config={'bits': 4})
  with pytest.raises(CheckpointError, match='quantization_config=.*not quantised'):
    hf_load.open_checkpoint(whole)
  change_config(whole, text_config='small')
  with pytest.raises(CheckpointError, match="config.json: text_config='small': expected"):
    hf_load.open_checkpoint(whole)


def test_wrong_tensors_are_named(folder: Path) -> None:
  """All that is missing, unexpected or wrongly shaped stands in one message."""
  spoilt = tensors(folder)
  del spoilt['model.norm.weight']
  spoilt['model.layers.1.self_attn.q_proj.bias'] = np.zeros(16, np.float32)
  spoilt['lm_head.weight'] = np.zeros((38, 16), np.float32)
  spoilt['model.embed_tokens.weight'] = np.zeros((37, 16), np.int32)
  safetensors.save_file(spoilt, folder / SINGLE)
  with pytest.raises(CheckpointError) as caught:
    load(folder)
  for text in (
    'model.norm.weight is missing',
    'model.layers.1.self_attn.q_proj.bias is unexpected',
    'lm_head.weight is [38, 16], expected [37, 16]',
    'model.embed_tokens.weight is of type I32, expected one of F32, BF16, F16',
  ):
    assert text in str(caught.value)


def test_files_that_cannot_be_read(folder: Path) -> None:
  """No folder, pickled tensors, a file that ends early, an index that is damaged."""
  with pytest.raises(CheckpointError, match='written hf:owner/name'):
    hf_load.open_checkpoint(folder / 'nothing')
  content = (folder / SINGLE).read_bytes()
  (folder / SINGLE).write_bytes(content[:-7])
  with pytest.raises(CheckpointError, match='not a whole file of safetensors'):
    load(folder)
  shape = '"shape": [1], "data_offsets": [0, 4]'
  for header in ('[]', '3', '{"a": 3}', '{"a": {}}', f'{{"a": {{"dtype": "F32", {shape[:-4]}]}}}}'):
    (folder / SINGLE).write_bytes(len(header).to_bytes(8, 'little') + header.encode())
    with pytest.raises(CheckpointError, match='not a whole file of safetensors'):
      load(folder)
  (folder / SINGLE).rename(folder / 'pytorch_model.bin')
  with pytest.raises(CheckpointError, match=r'pytorch_model.bin .*save_pretrained'):
    load(folder)
  (folder / 'pytorch_model.bin').unlink()
  with pytest.raises(CheckpointError, match='neither model.safetensors nor'):
    load(folder)
  (folder / INDEX).write_text('{}')
  with pytest.raises(CheckpointError, match='damaged'):
    load(folder)
  (folder.parent / 'outside').write_bytes(content)
  for name in ('../outside', str(folder.parent / 'outside'), '..', '', 'a\\b', 3):
    (folder / INDEX).write_text(json.dumps({'weight_map': {'lm_head.weight': name}}))
    with pytest.raises(CheckpointError, match=f'{INDEX}: names .*, which is no file of its folder'):
      load(folder)
  for damaged in (
    '[]',
    '{"weight_map": {"a": [], "b": "c"}}',
    '{"weight_map": {"a": 1, "b": "c"}}',
  ):
    (folder / INDEX).write_text(damaged)
    with pytest.raises(CheckpointError, match='damaged'):
      load(folder)
  (folder / 'config.json').write_text('[')
  with pytest.raises(CheckpointError, match='config.json: damaged'):
    load(folder)


def test_a_policy_is_no_reward_model(folder: Path) -> None:
  """Nor the other way round; nor is a classifier of several kinds."""
  scorer = hf_load.open_checkpoint(hf_golden.FOLDER / 'llama_scorer')
  with pytest.raises(CheckpointError, match='scores texts and cannot write'):
    hf_load.load_decoder(scorer, hf_golden.abstract_decoder(scorer.model))
  policy = hf_load.open_checkpoint(folder)
  with pytest.raises(CheckpointError, match="expected 'LlamaForSequenceClassification'"):
    hf_load.load_scorer(policy, hf_golden.abstract_scorer(policy.model))
  three = {str(number): str(number) for number in range(3)}
  change_config(folder, architectures=['LlamaForSequenceClassification'], id2label=three)
  with pytest.raises(CheckpointError, match='3 labels'):
    hf_load.open_checkpoint(folder)
  change_config(folder, id2label=1)
  with pytest.raises(CheckpointError, match='a classifier with id2label=1'):
    hf_load.open_checkpoint(folder)
  change_config(folder, id2label={'0': 'score'}, rlhf_jax={'score_bias': 'high'})
  with pytest.raises(CheckpointError, match=r'rlhf_jax=.*high.*expected'):
    print(hf_load.open_checkpoint(folder).score_bias)
  change_config(folder, architectures='LlamaForCausalLM')
  with pytest.raises(CheckpointError, match="architectures='LlamaForCausalLM': expected a list"):
    hf_load.open_checkpoint(folder)


def test_copies_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
  """Devices with the same part of a tensor share it: the host reads each number once."""
  golden = hf_golden.load('llama2')
  mesh = make_mesh(MeshConfig(data=4, fsdp=2, tensor=1))
  seen = 0
  real = hf_layout.read

  def read(*arguments: Any) -> np.ndarray:
    nonlocal seen
    found = real(*arguments)
    seen += found.size
    return found

  monkeypatch.setattr(hf_layout, 'read', read)
  abstract = abstract_decoder(golden.model, mesh)
  params = hf_load.load_decoder(golden.checkpoint, abstract)
  assert seen < 1.1 * sum(leaf.size for leaf in jax.tree.leaves(params))


MEASURE = """
import gc, pathlib, sys
import jax
from rlhf_jax.models import decoder, hf_load

def load():
  checkpoint = hf_load.open_checkpoint(sys.argv[1])
  abstract = jax.eval_shape(lambda: decoder.init(checkpoint.model, jax.random.key(0)))
  return jax.block_until_ready(hf_load.load_decoder(checkpoint, abstract))

def status(key):
  text = pathlib.Path('/proc/self/status').read_text()
  return int(text.split(key + ':')[1].split()[0]) * 1024

load()  # compiles
gc.collect()
pathlib.Path('/proc/self/clear_refs').write_text('5')  # the peak begins anew
before = status('VmRSS')
params = load()
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(status('VmHWM') - before - size)
"""


def memory_beside_parameters(folder: Path) -> tuple[int, int]:
  """What a process that loads a folder holds beside the parameters; and its largest file."""
  file = max(path.stat().st_size for path in folder.glob('*.safetensors'))
  # What is freed goes back to the system at once, or the peak would have what was given back late.
  freeing = {'MALLOC_MMAP_THRESHOLD_': '65536', 'MALLOC_TRIM_THRESHOLD_': '0'}
  done = subprocess.run(
    [sys.executable, '-c', MEASURE, str(folder)],
    env={**os.environ, **freeing},
    capture_output=True,
    text=True,
    check=True,
  )
  print(f'{int(done.stdout) / 1e6:.0f} MB beside the parameters; a file is {file / 1e6:.0f} MB')
  return int(done.stdout), file


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_the_host_holds_no_whole_table(tmp_path: Path) -> None:
  """Of a vocabulary in bfloat16, of which float32 is twice a file, no more than of layers."""
  import ml_dtypes

  size, width = 120_000, 256
  shutil.copyfile(LLAMA / 'config.json', tmp_path / 'config.json')
  change_config(tmp_path, vocab_size=size, hidden_size=width, head_dim=4, num_hidden_layers=1)
  rng, held = np.random.default_rng(0), {}
  checkpoint = hf_load.open_checkpoint(tmp_path)
  leaves = trees.flatten(hf_golden.abstract_decoder(checkpoint.model))
  sizes = hf_layout.axis_sizes(checkpoint.model)
  for name, pieces in hf_model.plan(checkpoint.family, 1, leaves, '').items():
    shape = hf_layout.parse(pieces[0].tensor.layout).their_shape(sizes)
    held[name] = rng.random(shape, np.float32).astype(ml_dtypes.bfloat16)
  files = {f'{i}.safetensors': [name] for i, name in enumerate(held)}
  for file, names in files.items():
    safetensors.save_file({name: held[name] for name in names}, tmp_path / file)
  weight_map = {name: file for file, names in files.items() for name in names}
  (tmp_path / INDEX).write_text(json.dumps({'weight_map': weight_map}))
  extra, largest = memory_beside_parameters(tmp_path)
  assert extra < 1.3 * largest + 2 * 4 * hf_place._BLOCK  # one is read, one on its way


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_the_host_holds_one_file_and_one_layer(tmp_path: Path) -> None:
  """Beside the parameters themselves: at most 1.3 times a file of tensors, and one layer."""
  config = json.loads((LLAMA / 'config.json').read_text())
  width, layers = 512, 12
  config |= dict(
    hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, head_dim=width // 4
  )
  (tmp_path / 'config.json').write_text(json.dumps(config))
  shapes = {
    **{f'self_attn.{name}_proj.weight': (width, width) for name in 'qkvo'},
    **{f'mlp.{name}_proj.weight': (4 * width, width) for name in ('gate', 'up')},
    'mlp.down_proj.weight': (width, 4 * width),
    **{f'{name}_layernorm.weight': (width,) for name in ('input', 'post_attention')},
  }
  rng = np.random.default_rng(0)
  weight_map: dict[str, str] = {}
  for layer in range(layers):
    one = {
      f'model.layers.{layer}.{name}': rng.random(shape, np.float32)
      for name, shape in shapes.items()
    }
    if layer == 0:
      one |= {
        name: rng.random((37, width), np.float32)
        for name in ('model.embed_tokens.weight', 'lm_head.weight')
      }
      one['model.norm.weight'] = rng.random(width, np.float32)
    safetensors.save_file(one, tmp_path / f'{layer}.safetensors')
    weight_map |= dict.fromkeys(one, f'{layer}.safetensors')
  (tmp_path / INDEX).write_text(json.dumps({'weight_map': weight_map}))
  extra, file = memory_beside_parameters(tmp_path)  # which is a layer
  assert extra < 2.3 * file
