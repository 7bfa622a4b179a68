"""tensorflow-datasets without TensorFlow: demonstrations or prompts from array_record files."""

from typing import Any

from rlhf_jax.common.errors import DataError
from rlhf_jax.data.config import TFDSConfig
from rlhf_jax.data.rejects import Rejects
from rlhf_jax.feedback.records import Demonstration, Prompt, RecordError


def read(
  name: str, split: str, data_dir: str | None, config: TFDSConfig, rejects: Rejects
) -> list[Prompt | Demonstration]:
  """Reads a split of the builder `name`; records that cannot be read go to `rejects`.

  Raises:
    DataError: no such builder, split or field, or its files are not array_record.
  """
  rows = _open(name, split, data_dir)
  records: list[Prompt | Demonstration] = []
  for number, row in enumerate(rows, 1):
    try:
      records.append(_record(row, config))
    except RecordError as error:
      rejects.add(f'tfds:{name}[{split}]', number, error, repr(row))
  if not records and not len(rejects):
    raise DataError(f'tfds:{name}: split {split!r} is empty. Name another.')
  return records


def _open(name: str, split: str, data_dir: str | None) -> Any:
  import tensorflow_datasets as tfds

  try:
    return tfds.data_source(name, split=split, data_dir=data_dir)
  except Exception as error:  # it raises a dozen kinds, from its registry, files and the network
    first = str(error).strip().partition('\n')[0]
    raise DataError(
      f'tfds:{name}: split {split!r} of data_dir {data_dir!r} cannot be opened '
      f'({type(error).__name__}: {first}). Check the name, --config.data.path (the data_dir) and '
      '--config.data.tfds.split; its files must be array_record.'
    ) from error


def _record(row: dict[str, Any], config: TFDSConfig) -> Prompt | Demonstration:
  prompt = '' if config.prompt_field is None else _text(row, config.prompt_field)
  if config.response_field is None:
    return Prompt(prompt)
  return Demonstration(prompt, _text(row, config.response_field))


def _text(row: dict[str, Any], field: str) -> str:
  if field not in row:
    raise DataError(
      f'field {field!r} is not among {sorted(row)}. Name it in --config.data.tfds.prompt_field or '
      'response_field.'
    )
  value = row[field]
  if not isinstance(value, bytes | str):
    raise RecordError(field, f'expected text, got {type(value).__name__}')
  try:
    return value.decode() if isinstance(value, bytes) else value
  except UnicodeDecodeError as error:
    raise RecordError(field, f'not UTF-8 at byte {error.start + 1}') from None
