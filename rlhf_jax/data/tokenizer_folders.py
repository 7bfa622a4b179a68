"""What the files of a tokenizer folder say beside its vocabulary."""

import json
import pathlib
from typing import Any

from rlhf_jax.common.errors import DataError

TOKENIZER, CONFIG = 'tokenizer.json', 'tokenizer_config.json'
TEMPLATE, GENERATION, MODEL = 'chat_template.jinja', 'generation_config.json', 'config.json'
_MAP = 'special_tokens_map.json'
_SPECIAL = ('pad', 'bos', 'eos')


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file, empty if there is none; raises DataError if it is no object."""
  if not file.is_file():
    return {}
  try:
    values = json.loads(file.read_text(encoding='utf-8'))
  except ValueError as error:
    raise DataError(f'{file}: not JSON that can be read ({error}).') from error
  if not isinstance(values, dict):
    raise DataError(f'{file}: expected a JSON object, got {type(values).__name__}.')
  return values


def special_tokens(folder: pathlib.Path) -> dict[str, str | None]:
  """The tokens of 'pad', 'bos' and 'eos', None where there is none.

  They stand in `tokenizer_config.json` or, in older folders, in `special_tokens_map.json`. Folders
  as old as GPT-2's name none at all: the class that transformers has for them knows.
  """
  files = {file: read_json(file) for file in (folder / _MAP, folder / CONFIG)}
  config = {key: (file, value) for file, values in files.items() for key, value in values.items()}
  keys = {name: f'{name}_token' for name in _SPECIAL}
  names = {name: _content(key, *config.get(key, (folder, None))) for name, key in keys.items()}
  if names['eos'] is None:
    converted = _known_to_transformers(folder)
    for name in _SPECIAL:
      if names[name] is None and f'{name}_token' not in config:
        names[name] = getattr(converted, f'{name}_token', None)
  return names


def adds_bos(folder: pathlib.Path, backend: Any, bos_id: int | None) -> bool:
  """Whether texts get the token in front: as the folder says, or as its post-processor does it."""
  said = read_json(folder / CONFIG).get('add_bos_token')
  if isinstance(said, bool):
    return said
  return bos_id is not None and backend.encode('a', add_special_tokens=True).ids[:1] == [bos_id]


def _content(key: str, file: pathlib.Path, token: Any) -> str | None:
  """Hugging Face writes a token as a string, or as an object with its properties."""
  content = token.get('content') if isinstance(token, dict) else token
  if token is None or isinstance(content, str):
    return content
  raise DataError(f"{file}: {key}={token!r}: expected a text, null, or an object with 'content'.")


def _known_to_transformers(folder: pathlib.Path) -> Any:
  """What transformers makes of a folder that says which class is its own; None for others."""
  model = read_json(folder / MODEL).get('model_type')
  named = read_json(folder / CONFIG).get('tokenizer_class')
  if model is None and named in (None, 'PreTrainedTokenizerFast'):
    return None
  try:
    return _by_transformers(folder)
  except Exception:  # whatever it meets there; then the folder says too little
    return None


def _by_transformers(folder: pathlib.Path) -> Any:
  """Its tokenizer as transformers reads it, which may not run code that lies there."""
  import transformers

  return transformers.AutoTokenizer.from_pretrained(
    str(folder), local_files_only=True, trust_remote_code=False
  )


def check_code(folder: pathlib.Path) -> None:
  """Raises DataError for a tokenizer that is code of its own: its files alone may mean another."""
  own = read_json(folder / CONFIG).get('auto_map')
  own = own.get('AutoTokenizer') if isinstance(own, dict) else own
  if own:
    raise DataError(
      f'{folder / CONFIG}: the tokenizer is code of its own (auto_map={own!r}), which is not run. '
      f'Convert it where you trust that code, and save it with a {TOKENIZER} and without auto_map.'
    )


def chat_template(folder: pathlib.Path) -> str | None:
  """The folder's chat template, the 'default' of several; None without one.

  Raises:
    DataError: there are several and none is the default, or it is no text.
  """
  if (folder / TEMPLATE).is_file():
    return (folder / TEMPLATE).read_text(encoding='utf-8')
  for file in (folder / 'chat_template.json', folder / CONFIG):
    found = read_json(file).get('chat_template')
    if isinstance(found, list):
      if not all(isinstance(each, dict) and {'name', 'template'} <= each.keys() for each in found):
        raise DataError(
          f"{file}: chat_template={found!r:.200}: expected objects with 'name' and 'template'."
        )
      found = {str(each['name']): each['template'] for each in found}
    if isinstance(found, dict):
      if 'default' not in found:
        raise DataError(
          f"{file}: its chat templates are {sorted(found)}, none is 'default'. Write the one to "
          'use to a file and name it: --config.data.chat_template=FILE.jinja.'
        )
      found = found['default']
    if isinstance(found, str):
      return found
    if found is not None:
      raise DataError(f'{file}: chat_template={found!r:.200}: expected a text.')
  return None


def stop_tokens(folder: pathlib.Path) -> tuple[int, ...]:
  """The ids that `generation_config.json` ends responses at, without it the model's `config.json`.

  The latter may name ids that are not in the vocabulary, for classes of transformers have defaults.
  """
  file = folder / (GENERATION if (folder / GENERATION).is_file() else MODEL)
  values = read_json(file)
  text = values.get('text_config')  # of models that read pictures too
  given = {**(text if isinstance(text, dict) else {}), **values}.get('eos_token_id')
  ids = given if isinstance(given, list) else [] if given is None else [given]
  if any(isinstance(number, bool) or not isinstance(number, int) or number < 0 for number in ids):
    raise DataError(f'{file}: eos_token_id: expected an id or a list of ids, got {given!r}.')
  return tuple(ids)


def convert(folder: pathlib.Path) -> tuple[Any, dict[str, str | None]]:
  """The backend and special tokens of a folder without `tokenizer.json`, by transformers.

  Raises:
    DataError: there is no folder, or transformers knows no way.
  """
  if not folder.is_dir():
    raise DataError(
      f"{folder}: no such folder. --config.data.tokenizer is 'word', 'byte' or a folder."
    )
  try:
    converted = _by_transformers(folder)
  except Exception as error:  # whatever transformers meets in a foreign folder
    first = str(error).strip().partition('\n')[0]
    raise DataError(
      f'{folder}: no {TOKENIZER}, and transformers cannot read a tokenizer from it ({first}).'
    ) from error
  backend = getattr(converted, 'backend_tokenizer', None)
  if backend is None:
    raise DataError(
      f'{folder}: no {TOKENIZER}, and transformers has its {type(converted).__name__} in Python '
      f'alone. Save it with a {TOKENIZER}, or name another tokenizer.'
    )
  return backend, {name: getattr(converted, f'{name}_token') for name in _SPECIAL}
