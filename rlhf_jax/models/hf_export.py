"""Writes decoders, reward models and value functions as folders that transformers loads."""

import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rlhf_jax.common import trees
from rlhf_jax.common.errors import CheckpointError
from rlhf_jax.data import tokenizers
from rlhf_jax.data.tokenizer_folders import GENERATION, TEMPLATE, read_json
from rlhf_jax.models import hf_layout, hf_model
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf_families import Family
from rlhf_jax.models.hf_files import (
  CONFIG,
  DTYPES,
  SHARD_BYTES,
  Entry,
  numpy_dtype,
  write_json,
  write_tensors,
)
from rlhf_jax.models.hf_load import (
  OWN,
  SCORE,
  SCORE_BIAS,
  Checkpoint,
  Score,
  ignored,
  open_tensor,
  verify,
)
from rlhf_jax.models.hf_model import Piece

# What belongs to a tokenizer, its chat template too; a folder has some of them.
TOKENIZER_FILES = (
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'tokenizer.model',
  'vocab.json',
  'vocab.txt',
  'merges.txt',
  TEMPLATE,
  'chat_template.json',
)
# Keys of a config.json that say of which kind the model in it is, not how its trunk is built.
_KINDS = ('architectures', 'torch_dtype', 'dtype', 'id2label', 'label2id', 'problem_type', OWN)


@dataclasses.dataclass(frozen=True)
class Assets:
  """What a checkpoint folder holds beside its tensors.

  Attributes:
    tokenizer: a folder with the files of the tokenizer and its chat template.
    config: the config.json that the decoder came from, which then keeps all it said; None: a new
      one, of the first family that has this decoder.
    generation: the generation_config.json; None: one with the tokenizer's special ids.
    trained: the tokenizer folder of the run, whose chat template and stops go before those of
      `tokenizer`; None: there is no other.
  """

  tokenizer: pathlib.Path
  config: Mapping[str, Any] | None = None
  generation: Mapping[str, Any] | None = None
  trained: pathlib.Path | None = None


def export_policy(
  target: pathlib.Path,
  model: ModelConfig,
  params: Any,
  assets: Assets,
  *,
  dtype: str = 'float32',
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes a policy.

  Args:
    target: a folder that does not exist or is empty; it appears when all is written.
    model: the decoder.
    params: its parameters.
    assets: tokenizer and the like.
    dtype: 'float32', 'bfloat16' or 'float16', in which tensors are stored.
    shard_bytes: the largest file.

  Raises:
    CheckpointError: the folder holds something, no family has this decoder, or a number is too
      large for the type.
  """
  family = family_of(target, model, assets)
  entries = decoder_entries(family, model, params, dtype, str(target))
  config = _config(family, model, assets) | {'architectures': [family.causal_lm], 'dtype': dtype}
  with new_folder(target) as folder:
    write_tensors(folder, entries, shard_bytes)
    write_json(folder / CONFIG, config)
    write_json(folder / GENERATION, _generation(assets))
    _write_tokenizer(assets, folder)


def export_scorer(
  target: pathlib.Path,
  model: ModelConfig,
  params: Any,
  assets: Assets,
  *,
  dtype: str = 'float32',
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes a reward model, or a value function, as a sequence classifier with one label.

  The bias of `score_of` stands in config.json as `rlhf_jax.score_bias`, for `hf_load` to add.

  Args:
    target: as in `export_policy`, like what follows.
    model: the trunk.
    params: the tree of `roles.init_reward_model`.
    assets: tokenizer and the like.
    dtype: in which tensors are stored.
    shard_bytes: the largest file.

  Raises:
    CheckpointError: as in `export_policy`.
  """
  family = family_of(target, model, assets, scores=True)
  trunk = {name: leaf for name, leaf in params['trunk'].items() if name != 'unembedding'}
  weight, offset = score_of(params)
  entries = decoder_entries(family, model, trunk, dtype, str(target))
  entries.append(Entry(SCORE.name, weight.shape, dtype, lambda: cast(weight, dtype, SCORE.name)))
  config = _config(family, model, assets) | {
    'architectures': [family.classifier],
    'dtype': dtype,
    'id2label': {'0': 'score'},
    'label2id': {'score': 0},
    'problem_type': 'regression',
    OWN: {SCORE_BIAS: offset},
  }
  tokenizer = tokenizers.load(assets.tokenizer)
  ends = config.get('eos_token_id')
  ends = {*tokenizer.stop_ids, *(ends if isinstance(ends, list) else [ends])}
  pad = config.get('pad_token_id')
  pad = tokenizer.pad_id if pad is None else pad
  # transformers reads the score at the last token that is not padding: it would miss the end.
  config['pad_token_id'] = None if pad in ends else pad
  with new_folder(target) as folder:
    write_tensors(folder, entries, shard_bytes)
    write_json(folder / CONFIG, config)
    _write_tokenizer(assets, folder)


def score_of(params: Any) -> Score:
  """The score of a reward model, gain * (head + its bias) + bias, as transformers can have it.

  Its classifiers have no bias: the gain is multiplied into the head's weights, and gain * (its
  bias) + bias is left over. In transformers all scores are lower by that constant, which changes no
  comparison.
  """
  gain, bias = (float(params['normalizer'][name]) for name in ('gain', 'bias'))
  weight = np.asarray(params['head']['kernel'], np.float32).T * np.float32(gain)
  return Score(weight, float(np.float32(gain * float(params['head']['bias'][0]) + bias)))


def convert(
  checkpoint: Checkpoint,
  target: pathlib.Path,
  *,
  dtype: str | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes a checkpoint again, in another type (None: each tensor's own) or other shards.

  Tensors pass one by one, and lose nothing if the type is kept. Arguments and errors are those of
  `export_policy`; tensors that are not those of its config.json are an error too.
  """
  verify(checkpoint)
  entries = []
  for name, header in checkpoint.headers.items():
    if ignored(name):
      continue
    kind = DTYPES[header.dtype] if dtype is None else dtype

    def read(name: str = name, kind: str = kind) -> np.ndarray:
      with open_tensor(checkpoint, name) as tensor:
        return cast(tensor[:], kind, name)

    entries.append(Entry(name, header.shape, kind, read))
  config = dict(checkpoint.config)
  if dtype is not None:
    config.pop('torch_dtype', None)
    config['dtype'] = dtype
  with new_folder(target) as folder:
    write_tensors(folder, entries, shard_bytes)
    write_json(folder / CONFIG, config)
    copy_tokenizer(checkpoint.folder, folder)
    if (checkpoint.folder / GENERATION).is_file():
      shutil.copyfile(checkpoint.folder / GENERATION, folder / GENERATION)


def decoder_entries(
  family: Family, model: ModelConfig, params: Any, dtype: str, where: str
) -> list[Entry]:
  """A decoder's tensors, layer after layer, each fetched from the devices when it is read."""
  sizes, leaves = hf_layout.axis_sizes(model), trees.flatten(params)

  def fetch(piece: Piece) -> np.ndarray:
    leaf = leaves[piece.param]
    return np.asarray(leaf if piece.layer is None else leaf[piece.layer])

  def entry(name: str, pieces: list[Piece]) -> Entry:
    layout = hf_layout.parse(pieces[0].tensor.layout)
    ordered = sorted(pieces, key=lambda piece: piece.tensor.part)

    def read() -> np.ndarray:
      return cast(hf_layout.join(layout, sizes, [fetch(piece) for piece in ordered]), dtype, name)

    return Entry(name, layout.their_shape(sizes), dtype, read)

  def place(pieces: list[Piece]) -> int:
    param, layer, _ = pieces[0]
    first = param in ('embedding', 'positions')
    return -1 if first else model.layers if layer is None else layer

  sources = hf_model.plan(family, model.layers, leaves, where)
  return [entry(name, sources[name]) for name in sorted(sources, key=lambda n: place(sources[n]))]


def cast(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
  """A tensor in another type; raises CheckpointError if its numbers do not fit."""
  with np.errstate(over='ignore'):
    narrow = values.astype(numpy_dtype(dtype), copy=False)
  if dtype == 'float16' and not np.array_equal(np.isfinite(narrow), np.isfinite(values)):
    raise CheckpointError(
      f'{name}: it has numbers beyond 65504, the largest of float16. Use bfloat16 or float32.'
    )
  return narrow


def copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies the files of a tokenizer, as many as there are."""
  for name in TOKENIZER_FILES:
    if (source / name).is_file():
      shutil.copyfile(source / name, target / name)


def read_assets(folder: pathlib.Path, trained: pathlib.Path | None = None) -> Assets:
  """The assets of a checkpoint folder, `trained` added."""
  config, generation = (
    read_json(folder / name) if (folder / name).is_file() else None for name in (CONFIG, GENERATION)
  )
  text = None if config is None else hf_model.text_part(str(folder / CONFIG), config)
  return Assets(folder, text, generation, trained)


def family_of(
  target: pathlib.Path, model: ModelConfig, assets: Assets, *, scores: bool = False
) -> Family:
  """The family of the config that the decoder came from, or the first that has it."""
  if assets.config is None:
    if scores:  # they read out no tokens
      model = dataclasses.replace(model, tied_embeddings=True)
    return hf_model.family_for(model, str(target))
  family = hf_model.family_of(CONFIG, assets.config)
  lacking = hf_model.differences(model, hf_model.to_model(CONFIG, assets.config, family))
  if set(lacking) - ({'tied_embeddings'} if scores else set()):
    raise CheckpointError(
      f'{target}: the decoder is not that of the {CONFIG} it came from; it differs in '
      f'{", ".join(lacking)}.'
    )
  return family


def _config(family: Family, model: ModelConfig, assets: Assets) -> dict[str, Any]:
  """The config of the trunk, special tokens included."""
  if assets.config is not None:
    return {name: value for name, value in assets.config.items() if name not in _KINDS}
  return {**hf_model.to_config(model, family), **_special_ids(assets.tokenizer)}


def _special_ids(folder: pathlib.Path) -> dict[str, int | None]:
  tokenizer = tokenizers.load(folder)
  return {f'{name}_token_id': getattr(tokenizer, f'{name}_id') for name in ('bos', 'eos', 'pad')}


def _generation(assets: Assets) -> dict[str, Any]:
  """How transformers is to generate: it ends where the library ends."""
  stops = tokenizers.load(assets.trained or assets.tokenizer).stop_ids
  values = dict(_special_ids(assets.tokenizer) if assets.generation is None else assets.generation)
  known = values.get('eos_token_id')
  known = known if isinstance(known, list) else [] if known is None else [known]
  if set(stops) - set(known):
    values['eos_token_id'] = [*stops, *(i for i in known if i not in stops)]
  return values


def _write_tokenizer(assets: Assets, folder: pathlib.Path) -> None:
  copy_tokenizer(assets.tokenizer, folder)
  if assets.trained is not None and (assets.trained / TEMPLATE).is_file():
    # transformers reads this file before any other place of a template.
    shutil.copyfile(assets.trained / TEMPLATE, folder / TEMPLATE)


@contextlib.contextmanager
def new_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder that gets its name when it is whole."""
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise CheckpointError(f'{target}: it is there already. Name another folder, or delete it.')
  target.parent.mkdir(parents=True, exist_ok=True)
  temporary = target.with_name(f'.{target.name}.tmp')
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir()
  try:
    yield temporary
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise
  if target.exists():
    target.rmdir()
  temporary.rename(target)
