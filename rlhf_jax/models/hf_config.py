"""Reads and writes what config.json files say in more than one way: rotations, windows, scales.

An `Aspect` is a piece of such a file that several families share: from settings to fields of
`ModelConfig`, and back.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rlhf_jax.common.errors import CheckpointError
from rlhf_jax.models.config import ModelConfig

Fields = dict[str, Any]

SLIDING, FULL = 'sliding_attention', 'full_attention'
# Of transformers; a config without a base means it.
_THETA = 10_000.0


class Settings:
  """A config.json with a family's defaults filled in; errors name the file, the field, the value.

  Attributes:
    where: the file.
    given: what it says.
  """

  def __init__(self, where: str, given: Mapping[str, Any], defaults: Mapping[str, Any]):
    self.where = where
    self.given = given
    self._values = {**defaults, **given}

  def __getitem__(self, key: str) -> Any:
    if key not in self._values:
      raise CheckpointError(f'{self.where}: there is no {key!r}, which this architecture needs.')
    return self._values[key]

  def get(self, key: str, default: Any = None) -> Any:
    """The value of a key that may be missing."""
    return self._values.get(key, default)

  def whole(self, key: str, least: int = 1) -> int:
    """A whole number; raises CheckpointError for anything else, or less."""
    value = self[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
      raise self.error(key, value, f'an integer >= {least}')
    return value

  def window(self) -> int | None:
    """How many tokens windowed layers see, if the file says so."""
    return None if self['sliding_window'] is None else self.whole('sliding_window')

  def error(self, key: str, value: object, expected: str, remedy: str = '') -> CheckpointError:
    """What is wrong with the value of a key."""
    return CheckpointError(f'{self.where}: {key}={value!r}: expected {expected}. {remedy}'.strip())


class Aspect(NamedTuple):
  """One piece of a config.json, read and written."""

  read: Callable[[Settings], Fields]
  write: Callable[[ModelConfig], Fields]


def _number(rope: Mapping[str, Any], name: str) -> float:
  """A finite one; raises what `_rotation_of` catches."""
  value = float(rope[name])
  if not math.isfinite(value):
    raise ValueError(f'{name}, not {value}')
  return value


def _rotation_fields(settings: Settings, key: str, rope: Mapping[str, Any]) -> Fields:
  """The fields of one set of rotation parameters, of transformers 5 or older."""
  kind = rope.get('rope_type', rope.get('type', 'default'))
  fields: Fields = {
    'rotary_theta': _number(rope, 'rope_theta'),
    'rotary_fraction': float(rope.get('partial_rotary_factor', 1.0)),
  }
  if kind == 'default':
    return fields
  if kind not in ('linear', 'llama3'):
    raise settings.error(
      f'{key}.rope_type', kind, "'default', 'linear' or 'llama3'", 'Other rotations are not built.'
    )
  fields |= {'rotary_scaling': kind, 'rotary_scaling_factor': _number(rope, 'factor')}
  if kind == 'llama3':
    fields |= {
      'rotary_low_factor': _number(rope, 'low_freq_factor'),
      'rotary_high_factor': _number(rope, 'high_freq_factor'),
      'rotary_original_length': int(
        rope.get('original_max_position_embeddings', settings['max_position_embeddings'])
      ),
    }
  return fields


def _rotation_of(settings: Settings, key: str, rope: Any) -> Fields:
  if not isinstance(rope, Mapping) or FULL in rope:
    raise settings.error(key, rope, 'one set of rotation parameters')
  try:
    return _rotation_fields(settings, key, rope)
  except (KeyError, TypeError, ValueError, OverflowError) as error:
    raise settings.error(key, rope, f'rotation parameters with a number for {error}') from error


def _given_rotation(settings: Settings) -> tuple[str, dict[str, Any]]:
  """The parameters a file gives, and under which key: older files call them rope_scaling."""
  key = 'rope_scaling' if settings.get('rope_scaling') else 'rope_parameters'
  given = settings.get(key)
  if given is not None and not isinstance(given, Mapping):
    raise settings.error(key, given, 'rotation parameters')
  return key, dict(given or {})


def _read_rotary(settings: Settings) -> Fields:
  key, rope = _given_rotation(settings)
  rope.setdefault('rope_theta', settings.get('rope_theta', _THETA))
  fraction = settings.get('partial_rotary_factor')
  if fraction is not None:
    rope.setdefault('partial_rotary_factor', fraction)
  return _rotation_of(settings, key, rope)


def _read_neox_rotary(settings: Settings) -> Fields:
  key, rope = _given_rotation(settings)
  rope.setdefault('rope_theta', settings.get('rotary_emb_base', _THETA))
  rope.setdefault('partial_rotary_factor', settings.get('rotary_pct', 0.25))
  return _rotation_of(settings, key, rope)


def _rope(model: ModelConfig) -> Fields:
  rope: Fields = {'rope_type': 'default', 'rope_theta': model.rotary_theta}
  if model.rotary_fraction != 1.0:
    rope['partial_rotary_factor'] = model.rotary_fraction
  if model.rotary_scaling == 'none':
    return rope
  rope |= {'rope_type': model.rotary_scaling, 'factor': model.rotary_scaling_factor}
  if model.rotary_scaling == 'llama3':
    rope |= {
      'low_freq_factor': model.rotary_low_factor,
      'high_freq_factor': model.rotary_high_factor,
      'original_max_position_embeddings': model.rotary_original_length,
    }
  return rope


def _write_neox_rotary(model: ModelConfig) -> Fields:
  return {'rope_parameters': _rope(model) | {'partial_rotary_factor': model.rotary_fraction}}


ROTARY = Aspect(_read_rotary, lambda model: {'rope_parameters': _rope(model)})
NEOX_ROTARY = Aspect(_read_neox_rotary, _write_neox_rotary)


def pattern_of(local: tuple[bool, ...]) -> str:
  """The shortest window pattern that, repeated, is local where `local` says."""
  letters = ''.join('L' if here else 'G' for here in local)
  return next(
    letters[:period]
    for period in range(1, len(letters) + 1)
    if all(letters[i] == letters[i % period] for i in range(len(letters)))
  )


def _windows(window: int | None, local: tuple[bool, ...]) -> Fields:
  if window is None or not any(local):
    return {'window': None, 'window_pattern': 'L'}
  return {'window': window, 'window_pattern': pattern_of(local)}


def _layer_types(settings: Settings, otherwise: Callable[[int], bool]) -> tuple[bool, ...]:
  """Which layers are windowed: as the file lists them, or by the family's rule."""
  layers, given = settings['num_hidden_layers'], settings.get('layer_types')
  if given is None:
    return tuple(otherwise(layer) for layer in range(layers))
  known = (SLIDING, FULL)
  if not isinstance(given, list) or len(given) != layers or any(i not in known for i in given):
    raise settings.error('layer_types', given, f'{layers} times {SLIDING!r} or {FULL!r}')
  return tuple(kind == SLIDING for kind in given)


def _write_layer_types(model: ModelConfig) -> Fields:
  kinds = [SLIDING if local else FULL for local in model.is_local()]
  return {'layer_types': kinds, 'sliding_window': model.window}


def _read_mistral(settings: Settings) -> Fields:
  window = settings.window()
  local = _layer_types(settings, lambda _: window is not None)
  if len(set(local)) > 1:
    raise settings.error('layer_types', settings['layer_types'], 'one kind for all layers')
  return _windows(window, local)


def _read_qwen(settings: Settings) -> Fields:
  window = settings.window() if settings['use_sliding_window'] else None
  first = 0 if window is None else settings.whole('max_window_layers', 0)
  return _windows(window, _layer_types(settings, lambda i: window is not None and i >= first))


def _write_qwen(model: ModelConfig) -> Fields:
  local = (*model.is_local(), True)
  return _write_layer_types(model) | {
    'use_sliding_window': model.window is not None,
    'max_window_layers': local.index(True),
  }


def _read_gemma2(settings: Settings) -> Fields:
  local = _layer_types(settings, lambda i: (i + 1) % 2 > 0)
  return _windows(settings.window(), local)


def _write_gemma2(model: ModelConfig) -> Fields:
  # transformers makes the mask of a window even where no layer has one.
  window = 4096 if model.window is None else model.window
  return _write_layer_types(model) | {'sliding_window': window}


def _read_gemma3(settings: Settings) -> Fields:
  """Windows and rotations: windowed layers have a base of their own, and are never scaled."""
  keys = ('sliding_window_pattern', '_sliding_window_pattern')
  period = next((settings.whole(key) for key in keys if settings.get(key) is not None), 6)
  local = _layer_types(settings, lambda i: (i + 1) % period > 0)
  fields = _windows(settings.window(), local)
  key, given = _given_rotation(settings)
  nested = key == 'rope_parameters'
  parts = {kind: (given.get(kind) if nested else None) or {} for kind in (FULL, SLIDING)}
  for kind, rope in parts.items():
    if not isinstance(rope, Mapping):
      raise settings.error(f'{key}.{kind}', rope, 'rotation parameters')
  full, sliding = dict(parts[FULL] if nested else given), dict(parts[SLIDING])
  if nested and given.keys() - {FULL, SLIDING}:
    raise settings.error(key, given, f'parameters for {FULL!r} and {SLIDING!r}')
  full.setdefault('rope_theta', settings.get('rope_theta', 1_000_000.0))
  sliding.setdefault('rope_theta', settings.get('rope_local_base_freq', _THETA))
  fields |= _rotation_of(settings, f'{key}.{FULL}' if nested else key, full)
  of_windows = _rotation_of(settings, f'{key}.{SLIDING}', sliding)
  if of_windows.get('rotary_scaling', 'none') != 'none':
    raise settings.error(f'{key}.{SLIDING}.rope_type', sliding.get('rope_type'), "'default'")
  if of_windows['rotary_fraction'] != fields['rotary_fraction']:
    raise settings.error(f'{key}.partial_rotary_factor', sliding, 'one value for all layers')
  if fields['window'] is not None:
    fields['rotary_local_theta'] = of_windows['rotary_theta']
  return fields


def _write_gemma3(model: ModelConfig) -> Fields:
  local = model.rotary_theta if model.rotary_local_theta is None else model.rotary_local_theta
  sliding = {'rope_type': 'default', 'rope_theta': local}
  return _write_gemma2(model) | {'rope_parameters': {FULL: _rope(model), SLIDING: sliding}}


MISTRAL_WINDOWS = Aspect(_read_mistral, lambda model: {'sliding_window': model.window})
QWEN_WINDOWS = Aspect(_read_qwen, _write_qwen)
GEMMA2_WINDOWS = Aspect(_read_gemma2, _write_gemma2)
GEMMA3_WINDOWS = Aspect(_read_gemma3, _write_gemma3)


def _write_gemma_scales(model: ModelConfig) -> Fields:
  scalar = model.attention_scale**-2
  return {'query_pre_attn_scalar': round(scalar) or scalar}


def _read_gemma_scales(settings: Settings) -> Fields:
  key = 'query_pre_attn_scalar'
  scalar = settings[key]
  if isinstance(scalar, bool) or not isinstance(scalar, int | float) or not scalar > 0:
    raise settings.error(key, scalar, 'a number > 0')
  return {
    'query_scale': scalar**-0.5,
    'embedding_scale': math.sqrt(settings.whole('hidden_size')),
  }


GEMMA_SCALES = Aspect(_read_gemma_scales, _write_gemma_scales)


def _read_gpt2_mlp(settings: Settings) -> Fields:
  absent = settings['n_inner'] is None
  return {'mlp_width': 4 * settings.whole('n_embd') if absent else settings.whole('n_inner')}


GPT2_MLP = Aspect(_read_gpt2_mlp, lambda model: {'n_inner': model.mlp_width})
