"""Configs as plain values: their types checked, to JSON and back, and what differs between two."""

import dataclasses
import difflib
import json
import math
import types
import typing
from typing import Any

from rlhf_jax.common.errors import ConfigError, UserError
from rlhf_jax.models.gaussian import GaussianPolicyConfig
from rlhf_jax.objectives import OBJECTIVES, ObjectiveConfig

# What is_name demands, in words.
NAME = "letters, digits, '-', '_' and '.'"


def is_name(name: object) -> bool:
  """Whether folders may be called by it."""
  return isinstance(name, str) and bool(name) and all(c.isalnum() or c in '-_.' for c in name)


def check_types(config: Any, path: str = '') -> None:
  """Demands of every field, also of configs within, the type it is annotated with.

  Flags are checked where they are read, but a config file can put anything anywhere. Raises
  ConfigError.
  """
  for name, hint in typing.get_type_hints(type(config)).items():
    value = getattr(config, name)
    if hint is ObjectiveConfig:
      options = tuple(row.config for row in OBJECTIVES.values())
    else:
      options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if not any(_fits(value, option) for option in options):
      kinds = ' or '.join(
        str(option) if typing.get_args(option) else option.__name__ for option in options
      )
      if not _finite(value):
        raise ConfigError(f'{path}{name}', value, 'finite numbers')
      raise ConfigError(f'{path}{name}', value, f'{kinds}, not {type(value).__name__}')
    if dataclasses.is_dataclass(value):
      check_types(value, f'{path}{name}.')
    if isinstance(value, tuple):
      for number, item in enumerate(value):
        if dataclasses.is_dataclass(item):
          check_types(item, f'{path}{name}[{number}].')


def _finite(value: Any) -> bool:
  if isinstance(value, tuple):
    return all(map(_finite, value))
  return not isinstance(value, float) or math.isfinite(value)


def _fits(value: Any, option: Any) -> bool:
  if typing.get_origin(option) is tuple:
    kind = typing.get_args(option)[0]
    return isinstance(value, tuple) and all(_fits(item, kind) for item in value)
  if option is float:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)
  return isinstance(value, option) and (option is bool or not isinstance(value, bool))


# Classes that stand in the place of others: their values carry the name as 'kind'.
KINDS: dict[str, type] = {
  **{name: row.config for name, row in OBJECTIVES.items()},
  'gaussian_policy': GaussianPolicyConfig,
}


def to_dict(config: Any) -> Any:
  """A config as JSON values; one that a field could hold another of carries its 'kind'."""
  if dataclasses.is_dataclass(config) and not isinstance(config, type):
    values = {
      field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)
    }
    kinds = [name for name, kind in KINDS.items() if kind is type(config)]
    return {'kind': kinds[0], **values} if kinds else values
  if isinstance(config, tuple | list):
    return [to_dict(value) for value in config]
  return config


def from_dict(kind: type, values: dict[str, Any]) -> Any:
  """The inverse of `to_dict`. Raises UserError for unknown fields."""
  values = dict(values)
  values.pop('kind', None)
  hints = typing.get_type_hints(kind)
  unknown = sorted(values.keys() - hints.keys())
  if unknown:
    raise UserError(f'{kind.__name__} has no field {unknown[0]!r}: {suggestion(unknown[0], hints)}')
  return kind(**{name: _typed(hints[name], value) for name, value in values.items()})


def _typed(hint: Any, value: Any) -> Any:
  options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
  if isinstance(value, dict):
    named = [kind for name, kind in KINDS.items() if name == value.get('kind')]
    kinds: list[Any] = [*named, *filter(dataclasses.is_dataclass, options)]
    return from_dict(kinds[0], value)
  if isinstance(value, list):
    kind: Any = (*typing.get_args(options[0]), None)[0]
    return tuple(from_dict(kind, item) if isinstance(item, dict) else item for item in value)
  return value


def suggestion(name: str, known: Any) -> str:
  """`did you mean ...?`, or the list of what there is."""
  close = difflib.get_close_matches(name, list(known), n=1)
  return f'did you mean {close[0]!r}?' if close else f'there are {", ".join(sorted(known))}.'


def canonical_json(values: Any) -> str:
  """One text for equal values, to compare and to fingerprint."""
  return json.dumps(values, sort_keys=True, indent=1)


def differences(first: Any, second: Any, path: str = '') -> list[str]:
  """Where two `to_dict` values differ, as `field: 1 -> 2` lines."""
  if isinstance(first, dict) and isinstance(second, dict):
    return [
      line
      for name in sorted(first.keys() | second.keys())
      for line in differences(first.get(name), second.get(name), f'{path}.{name}' if path else name)
    ]
  return [] if first == second else [f'{path}: {first!r} -> {second!r}']
