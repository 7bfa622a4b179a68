"""From a config.json to a decoder and back, by the table of families."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from rlhf_jax.common.errors import CheckpointError, ConfigError
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf_config import Settings
from rlhf_jax.models.hf_families import FAMILIES, Family, Tensor

# Theirs -> ours.
ACTIVATIONS = {
  'silu': 'silu',
  'swish': 'silu',
  'gelu': 'gelu',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu_new': 'gelu_tanh',
  'gelu_fast': 'gelu_tanh',
}
# Settings that no family may have, whatever the value; and where a part of a decoder would not do.
_NEVER = {
  'auto_map': 'Its code is its own: only architectures of transformers itself are known.',
  'quantization_config': 'Load a checkpoint that is not quantised.',
}
# A model that reads pictures too is a tower for them around a model of text: the model_type of the
# whole, what its classes are of the text part, and what its config says outside `text_config`.
_PICTURES, _TEXT = 'gemma3', 'text_config'
_TEXT_CLASSES = {
  'Gemma3ForConditionalGeneration': 'Gemma3ForCausalLM',
  'Gemma3ForSequenceClassification': 'Gemma3TextForSequenceClassification',
}
_OF_WHOLE = (
  'architectures',
  'dtype',
  'torch_dtype',
  'tie_word_embeddings',
  *(f'{name}_token_id' for name in ('bos', 'eos', 'pad')),
  *('id2label', 'label2id', 'problem_type'),
  *_NEVER,
)
_TEXT_TENSOR = re.compile(r'(?:model\.)?language_model\.(?:model\.)?(?P<inner>.+)')
_TOWER_TENSOR = re.compile(r'(model\.)?(vision_tower|multi_modal_projector)\.')
# How a model is computed, not which one it is; initial weights count no more either.
_COMPUTED = (
  'dtype',
  'attention',
  'vocab_chunk',
  'remat',
  'scan_layers',
  'vocab_multiple',
  'init_std',
)


class Piece(NamedTuple):
  """One tensor and one parameter, or one layer of it, that is read from it."""

  param: str
  layer: int | None
  tensor: Tensor


def text_part(where: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
  """The config of the text part of a model that reads pictures too; any other config as it is.

  Raises CheckpointError, which begins with `where`, if there is no such part.
  """
  if config.get('model_type') != _PICTURES:
    return config
  text = config.get(_TEXT)
  if not isinstance(text, Mapping):
    raise CheckpointError(
      f'{where}: {_TEXT}={text!r}: expected the settings of the text part of a model that reads '
      'pictures too.'
    )
  part = {'model_type': 'gemma3_text', **text}
  part |= {key: config[key] for key in _OF_WHOLE if key in config}
  if isinstance(kinds := part.get('architectures'), list):
    part['architectures'] = [_TEXT_CLASSES.get(str(kind), kind) for kind in kinds]
  return part


def text_tensor(name: str) -> str | None:
  """What a tensor of such a model is called in its text part alone; None: it is of pictures."""
  if _TOWER_TENSOR.match(name):
    return None
  found = _TEXT_TENSOR.fullmatch(name)
  if found is None:
    return name
  inner = found['inner']
  return inner if inner.startswith('lm_head.') else f'model.{inner}'


def family_of(where: str, config: Mapping[str, Any]) -> Family:
  """The row of a config.json; raises CheckpointError for architectures that no row covers."""
  for key, remedy in _NEVER.items():
    if config.get(key):
      raise CheckpointError(f'{where}: {key}={config[key]!r} is not supported. {remedy}')
  kind = config.get('model_type')
  for family in FAMILIES:
    if family.model_type == kind:
      return family
  known = ', '.join(family.model_type for family in FAMILIES)
  raise CheckpointError(f'{where}: model_type={kind!r}: expected one of {known}, {_PICTURES}.')


def plan(family: Family, layers: int, params: Iterable[str], where: str) -> dict[str, list[Piece]]:
  """The pieces of parameters that each tensor holds, by the name of the tensor.

  Raises CheckpointError, which begins with `where`, for a parameter that the family does not have.
  """
  sources: dict[str, list[Piece]] = {}
  for param in params:
    if param not in family.tensors:
      raise CheckpointError(f'{where}: {family.name} has no place for the parameter {param!r}.')
    tensor = family.tensors[param]
    for layer in range(layers) if param.startswith('layers.') else [None]:
      sources.setdefault(tensor.name.format(layer), []).append(Piece(param, layer, tensor))
  return sources


def to_model(where: str, config: Mapping[str, Any], family: Family | None = None) -> ModelConfig:
  """The decoder that a config.json describes.

  Args:
    where: the file, for messages.
    config: its content.
    family: its row; None: found by its model_type.

  Raises:
    CheckpointError: a setting that the decoder does not have, naming field and value.
  """
  family = family_of(where, config) if family is None else family
  settings = Settings(where, config, family.defaults)
  for key, value in {'is_causal': True, **family.only}.items():
    given = settings.get(key)
    if given is not None and given != value:
      raise settings.error(key, given, f'{value!r}', 'The decoder has no other kind.')
  fields: dict[str, Any] = dict(family.fixed)
  for name, key in family.fields.items():
    value = settings[key]
    if name == 'activation':
      if not isinstance(value, str) or value not in ACTIVATIONS:
        raise settings.error(key, value, f'one of {", ".join(ACTIVATIONS)}')
      value = ACTIVATIONS[value]
    _check_type(settings, name, key, value)
    fields[name] = value
  for aspect in family.aspects:
    fields |= aspect.read(settings)
  model = ModelConfig(**fields)
  try:
    model.validate('model')
  except ConfigError as error:
    raise CheckpointError(f'{where}: as a decoder it would be {error}') from error
  return model


def _check_type(settings: Settings, name: str, key: str, value: object) -> None:
  kinds: Any = typing.get_type_hints(ModelConfig)[name]
  kinds = typing.get_args(kinds) if isinstance(kinds, types.UnionType) else (kinds,)
  wider = (*kinds, int) if float in kinds else kinds
  if not isinstance(value, wider) or (isinstance(value, bool) and bool not in kinds):
    names = ' or '.join('null' if kind is type(None) else kind.__name__ for kind in kinds)
    raise settings.error(key, value, names)


def to_config(model: ModelConfig, family: Family) -> dict[str, Any]:
  """The keys of a config.json that say what a decoder is, in the words of a family."""
  values: dict[str, Any] = {'model_type': family.model_type}
  for name, key in family.fields.items():
    value = getattr(model, name)
    if name == 'activation':
      # Several names mean the same: the family's usual one, if it does.
      names = (family.defaults[key], *ACTIVATIONS)
      value = next(theirs for theirs in names if ACTIVATIONS[theirs] == value)
    elif name == 'kv_heads':
      value = model.num_kv_heads
    elif name == 'head_dim':
      value = model.size_per_head
    if value is not None or name != 'init_std':
      values[key] = value
  for aspect in family.aspects:
    values |= aspect.write(model)
  return values


def architecture(model: ModelConfig) -> dict[str, Any]:
  """What the logits of a decoder depend on beside its parameters, defaults filled in."""
  values = {
    field.name: getattr(model, field.name)
    for field in dataclasses.fields(ModelConfig)
    if field.name not in _COMPUTED
  }
  values |= {
    'kv_heads': model.num_kv_heads,
    'head_dim': model.size_per_head,
    'query_scale': model.attention_scale,
    'window_pattern': model.is_local(),
  }
  unread = ['max_length'] if model.positions == 'rotary' else ['rotary_scaling']
  values['rotary_fraction'] = model.rotary_dim
  if not any(model.is_local()):
    unread += ['window', 'rotary_local_theta']
  if model.rotary_local_theta == model.rotary_theta and model.rotary_scaling == 'none':
    unread += ['rotary_local_theta']
  if model.positions == 'learned':
    unread += [name for name in values if name.startswith('rotary_')]
  if model.rotary_scaling == 'none':
    unread += ['rotary_scaling_factor']
  if model.rotary_scaling != 'llama3':
    unread += ['rotary_low_factor', 'rotary_high_factor', 'rotary_original_length']
  return values | dict.fromkeys(unread)


def differences(first: ModelConfig, second: ModelConfig) -> list[str]:
  """The fields in which two decoders are not the same architecture."""

  def same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float | int):
      return math.isclose(a, b, rel_tol=1e-6)
    return a == b

  theirs = architecture(second)
  return [name for name, value in architecture(first).items() if not same(value, theirs[name])]


def family_for(model: ModelConfig, where: str) -> Family:
  """The first family that has this very decoder; raises CheckpointError if there is none.

  `where` says whose decoder it is, for the message.
  """
  closest: tuple[int, Family, list[str]] | None = None
  for family in FAMILIES:
    try:
      lacking = differences(model, to_model(where, to_config(model, family), family))
    except CheckpointError as error:
      lacking = [str(error)] * len(FAMILIES)
    if not lacking:
      return family
    if closest is None or len(lacking) < closest[0]:
      closest = len(lacking), family, lacking
  assert closest is not None
  _, family, lacking = closest
  values = ', '.join(f'{name}={getattr(model, name, None)!r}' for name in lacking[:4])
  raise CheckpointError(
    f'{where}: no model family of transformers has this decoder. The closest, {family.name}, is '
    f'another one in {values}.'
  )
