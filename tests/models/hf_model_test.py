"""config.json files become decoders and decoders config.json files; what cannot is refused."""

import dataclasses
import json
from typing import Any

import pytest

from rlhf_jax.common.errors import CheckpointError
from rlhf_jax.models import hf_model
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf_families import FAMILIES
from tests.golden.hf import cases
from tests.models import hf_golden
from tests.models.architectures import ARCHITECTURES, make_config

BY_TYPE = {family.model_type: family for family in FAMILIES}


def config_of(name: str) -> dict[str, Any]:
  """A config.json that transformers wrote."""
  return json.loads((hf_golden.FOLDER / name / 'config.json').read_text())


@pytest.mark.parametrize('name', cases.CASES)
def test_to_a_decoder_and_back(name: str) -> None:
  """What we write of a decoder says of it just what transformers' own file says."""
  config = config_of(name)
  family = hf_model.family_of(name, config)
  model = hf_model.to_model(name, config)
  written = hf_model.to_config(model, family)
  for key, value in written.items():
    expected = config.get(key)
    if key in ('sliding_window', 'max_window_layers') and model.window is None:
      continue  # a window that no layer has
    if key == 'n_inner' and expected is None:
      expected = 4 * config['n_embd']
    if key == 'head_dim' and expected is None:
      expected = model.size_per_head
    assert value == expected, key
  assert hf_model.family_for(model, name).model_type == family.model_type or name in (
    'mistral_long_window',
  )


@pytest.mark.parametrize('family', FAMILIES, ids=lambda family: family.model_type)
def test_defaults_are_those_of_transformers(family: Any) -> None:
  """A file that leaves everything out means what transformers' class means by it."""
  import transformers

  theirs = transformers.AutoConfig.for_model(family.model_type).to_dict()
  silent = {'n_inner', 'num_key_value_heads', 'head_dim', 'layer_types', 'sliding_window'}
  for key, value in family.defaults.items():
    if key in theirs and not (key in silent and (value is None or theirs[key] is None)):
      assert theirs[key] == value, key
  explicit = hf_model.to_model('explicit', theirs)
  implicit = hf_model.to_model('implicit', {'model_type': family.model_type})
  assert hf_model.differences(explicit, implicit) == []


@pytest.mark.parametrize(
  ('name', 'old'),
  [
    (
      'llama3',
      dict(
        rope_theta=500.0,
        rope_scaling=dict(
          rope_type='llama3',
          factor=8.0,
          low_freq_factor=1.0,
          high_freq_factor=4.0,
          original_max_position_embeddings=64,
        ),
      ),
    ),
    ('llama_linear', dict(rope_theta=100.0, rope_scaling=dict(type='linear', factor=4.0))),
    ('gpt_neox', dict(rotary_pct=0.5, rotary_emb_base=10_000)),
    (
      'gemma3',
      dict(
        rope_theta=1000.0,
        rope_local_base_freq=50.0,
        rope_scaling=dict(rope_type='linear', factor=8.0),
        sliding_window_pattern=3,
        layer_types=None,
      ),
    ),
    ('qwen2_windows', dict(layer_types=None, rope_theta=10_000.0)),
    ('gemma2', dict(layer_types=None, rope_theta=10_000)),
  ],
)
def test_older_files(name: str, old: dict[str, Any]) -> None:
  """The keys of transformers 4 mean the same as those of 5."""
  config = config_of(name)
  rope = {} if 'layer_types' in old and name != 'gemma3' else {'rope_parameters': None}
  older = {key: value for key, value in (config | rope | old).items() if value is not None}
  assert hf_model.to_model(name, older) == hf_model.to_model(name, config)


def test_fast_gelu_is_that_by_tanh() -> None:
  """As transformers has it for GPT-NeoX: another way to write the same function."""
  model = hf_model.to_model('', config_of('gpt_neox') | {'hidden_act': 'gelu_fast'})
  assert model.activation == 'gelu_tanh'


@pytest.mark.parametrize(
  ('name', 'changes', 'message'),
  [
    ('llama2', dict(model_type='mixtral'), "model_type='mixtral': expected one of llama, mistral"),
    ('llama2', dict(auto_map={'AutoModel': 'x.Y'}), 'auto_map=.*only architectures of'),
    ('llama2', dict(quantization_config={'bits': 4}), 'quantization_config=.*not quantised'),
    ('llama2', dict(is_causal=False), 'is_causal=False: expected True'),
    ('llama2', dict(hidden_act='relu'), "hidden_act='relu': expected one of silu"),
    ('llama2', dict(hidden_size='16'), "hidden_size='16': expected int"),
    ('llama2', dict(num_hidden_layers=True), 'num_hidden_layers=True: expected int'),
    ('llama2', dict(num_key_value_heads=3), 'kv_heads=3: expected a divisor'),
    (
      'llama2',
      dict(rope_parameters=dict(rope_type='yarn', rope_theta=1.0, factor=4.0)),
      "rope_parameters.rope_type='yarn': expected 'default', 'linear' or 'llama3'",
    ),
    ('llama2', dict(rope_scaling=dict(type='longrope')), "rope_scaling.rope_type='longrope'"),
    ('llama3', dict(rope_parameters=dict(rope_type='llama3')), "a number for 'factor'"),
    ('llama2', dict(rope_parameters=[1]), r'rope_parameters=\[1\]: expected rotation parameters'),
    (
      'llama2',
      dict(rope_parameters=dict(full_attention={})),
      'expected one set of rotation parameters',
    ),
    ('gpt2', dict(scale_attn_by_inverse_layer_idx=True), 'inverse_layer_idx=True: expected False'),
    ('gpt2', dict(scale_attn_weights=False), 'scale_attn_weights=False: expected True'),
    ('gemma2', dict(use_bidirectional_attention=True), 'bidirectional_attention=True'),
    ('gemma3', dict(attn_logit_softcapping=50.0), 'attn_logit_softcapping=50.0: expected None'),
    (
      'gemma3',
      dict(rope_parameters=dict(full_attention=3)),
      'rope_parameters.full_attention=3: expected rotation parameters',
    ),
    (
      'llama2',
      dict(rope_parameters=dict(rope_type='linear', rope_theta=1e4, factor=float('nan'))),
      'a number for factor, not nan',
    ),
    ('llama2', dict(rope_theta=float('inf'), rope_parameters=None), 'for rope_theta, not inf'),
    ('qwen2', dict(layer_types=[['full_attention'], {}]), r'layer_types=\[\[.*expected 2 times'),
    ('qwen2', dict(layer_types=['chunked_attention'] * 2), "expected 2 times 'sliding_attention'"),
    (
      'mistral_short_window',
      dict(layer_types=['sliding_attention', 'full_attention']),
      'one kind for all layers',
    ),
    (
      'gemma3',
      dict(rope_parameters=dict(sliding_attention=dict(rope_type='linear', factor=2.0))),
      "rope_parameters.sliding_attention.rope_type='linear': expected 'default'",
    ),
  ],
)
def test_what_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
  """The message names the file, the field and its value."""
  with pytest.raises(CheckpointError, match=message) as caught:
    hf_model.to_model('folder/config.json', config_of(name) | changes)
  assert str(caught.value).startswith('folder/config.json: ')


@pytest.mark.parametrize('name', ['gemma3', 'gpt2', 'gpt_neox', 'mistral_short_window', 'qwen2'])
def test_odd_values_are_refused_if_they_are_read(name: str) -> None:
  """Whatever a key holds, no other error than ours is raised, and it names the file."""
  config = config_of(name) | {'use_sliding_window': True}
  older = ('rope_scaling', 'rope_theta', 'sliding_window_pattern', 'attn_logit_softcapping')
  refused = 0
  for key in (*config, *older):
    for value in (
      None,
      True,
      '',
      'x',
      -1,
      0,
      float('nan'),
      float('inf'),
      [],
      [1, 2],
      {},
      {'a': None},
      [['a'], {}],
      {'full_attention': 3},
      {'full_attention': 'x', 'sliding_attention': [1]},
    ):
      try:
        hf_model.to_model('folder/config.json', config | {key: value})
      except CheckpointError as error:
        assert str(error).startswith('folder/config.json: ')
        refused += 1
  assert refused > 100


@pytest.mark.parametrize(
  ('name', 'model_type'),
  [
    ('default', 'llama'),
    ('gpt2', 'gpt2'),
    ('neox', 'gpt_neox'),
    ('llama3', 'llama'),
    ('mistral', 'mistral'),
    ('qwen3', 'qwen3'),
  ],
)
def test_a_decoder_finds_its_family(name: str, model_type: str) -> None:
  """The first one that has it; how it is computed does not count."""
  model = make_config(name, remat='full', scan_layers=True, dtype='bfloat16')
  assert hf_model.family_for(model, 'run').model_type == model_type


@pytest.mark.parametrize('name', ['gemma2', 'gemma3'])
def test_gemma_always_has_a_window(name: str) -> None:
  """transformers asks for one although no layer is windowed."""
  config = config_of(name)
  config['layer_types'] = ['full_attention'] * config['num_hidden_layers']
  model = hf_model.to_model(name, config)
  assert model.window is None
  family = hf_model.family_for(model, name)
  assert family.model_type == config['model_type']
  assert hf_model.to_config(model, family)['sliding_window'] == 4096


def test_a_decoder_without_a_family() -> None:
  """The message says what the closest family has otherwise."""
  with pytest.raises(CheckpointError, match='run: no model family .* norm_placement='):
    hf_model.family_for(make_config('post'), 'run')
  assert set(ARCHITECTURES) > {'post'}


def test_architectures_differ_only_in_what_is_read() -> None:
  """Defaults filled in, and switches that are off, are no difference."""
  plain = ModelConfig(vocab_size=8)
  same: dict[str, Any] = dict(
    kv_heads=4, head_dim=16, max_length=7, rotary_original_length=3, dtype='bfloat16'
  )
  assert hf_model.differences(plain, dataclasses.replace(plain, **same)) == []
  other: dict[str, Any] = dict(window=3, rotary_theta=1.0)
  assert hf_model.differences(plain, dataclasses.replace(plain, **other)) == [
    'rotary_theta',
    'window',
    'window_pattern',
  ]


def test_how_a_decoder_is_computed_does_not_count() -> None:
  """A policy that was trained with other kernels, chunks or types goes back to the same family."""
  model = hf_model.to_model('llama3', config_of('llama3'))
  computed = dataclasses.replace(
    model, dtype='bfloat16', attention='auto', vocab_chunk=8, remat='full', scan_layers=True
  )
  assert not hf_model.differences(model, computed)
  assert hf_model.differences(model, dataclasses.replace(model, rotary_theta=7.0)) == [
    'rotary_theta'
  ]
