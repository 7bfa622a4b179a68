"""Loads checkpoint folders of the Hugging Face world straight into sharded arrays.

A folder holds config.json and the tensors, in model.safetensors or in shards with an index. They
are read a tensor at a time, each device's part of it, so that the host never holds more than one
tensor of a layer, or a block of a table, beside what it has mapped of one file.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.common import trees
from rlhf_jax.common.errors import CheckpointError
from rlhf_jax.models import decoder, hf_layout, hf_model, hf_place
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf_families import Family, Tensor
from rlhf_jax.models.hf_files import CONFIG, DTYPES, Header, headers_of
from rlhf_jax.models.hf_hub import HUB, download, tensor_files
from rlhf_jax.models.hf_model import Piece

Params = dict[str, Any]

# The key of config.json under which we keep what transformers has no place for, and of that the key
# for what is added to scores.
OWN, SCORE_BIAS = 'rlhf_jax', 'score_bias'
SCORE = Tensor('score.weight', '1 d -> d 1')

# Constants that older versions of transformers saved among the weights.
_IGNORED = re.compile(r'(\.attn|\.attention)\.(masked_)?bias$|rotary_emb\.inv_freq$')
_CHECKED = 2**20  # numbers that are compared at a time


class Score(NamedTuple):
  """The score of a classifier with one label: hidden states times `weight`, and `bias`.

  Attributes:
    weight: `[1, width]`, float32.
    bias: which transformers has no place for.
  """

  weight: np.ndarray
  bias: float


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A checkpoint folder whose config and headers have been read.

  Attributes:
    folder: where it lies.
    config: the content of config.json; of a model that reads pictures too, that of its text part.
    family: its row of the table.
    model: the decoder. That of a reward model has no read-out of its own to tokens: its embeddings
      count as tied.
    scores: whether it is a reward model or value function (a sequence classifier with one label),
      not a policy.
    hub: the name of the hub that the folder was downloaded for; None: a folder of the user's own.
    pictures: whether it is the text part of a model that reads pictures too.
  """

  folder: pathlib.Path
  config: Mapping[str, Any]
  family: Family
  model: ModelConfig
  scores: bool
  hub: str | None = None
  pictures: bool = False

  @functools.cached_property
  def headers(self) -> dict[str, Header]:
    """All its tensors, by name; those of the hub are downloaded if they are not here yet.

    Of a model that reads pictures too: those of the text part, by their names in it.

    Raises CheckpointError for files that cannot be read.
    """
    files = tensor_files(self.folder, self.hub)
    found = {name: header for file in files for name, header in headers_of(file)}
    if not self.pictures:
      return found
    names = {name: hf_model.text_tensor(name) for name in found}
    return {text: found[name] for name, text in names.items() if text is not None}

  @property
  def score_bias(self) -> float:
    """What is added to the score of a reward model; see `hf_export.score_of`."""
    own = self.config.get(OWN, {})
    bias = own.get(SCORE_BIAS, 0.0) if isinstance(own, Mapping) else own
    if isinstance(bias, bool) or not isinstance(bias, int | float):
      raise CheckpointError(
        f'{self.folder / CONFIG}: {OWN}={own!r}: expected {SCORE_BIAS!r} in it.'
      )
    return float(bias)

  def as_scorer(self) -> 'Checkpoint':
    """Its trunk as that of a reward model."""
    return dataclasses.replace(
      self, scores=True, model=dataclasses.replace(self.model, tied_embeddings=True)
    )

  def find(self, name: str) -> str | None:
    """The name a tensor has in the files, None if it is not in them."""
    alias = self.family.aliases.get(name)
    names = [name, name.removeprefix(self.family.prefix), *([] if alias is None else [alias])]
    return next((found for found in names if found in self.headers), None)


def ignored(name: str) -> bool:
  """Whether a tensor is no weight."""
  return _IGNORED.search(name) is not None


def is_checkpoint(source: str | pathlib.Path) -> bool:
  """Whether a path is a checkpoint folder, or names one of the hub; runs have an 'identity'."""
  if str(source).startswith(HUB):
    return True
  try:
    config = json.loads((pathlib.Path(source) / CONFIG).read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return False
  return isinstance(config, dict) and 'identity' not in config


def open_checkpoint(source: str | pathlib.Path) -> Checkpoint:
  """Reads the config of a folder, or of `hf:owner/name`, of which no tensors are downloaded yet.

  Raises:
    CheckpointError: there is no such checkpoint, or no decoder of ours equals it.
  """
  hub = str(source) if str(source).startswith(HUB) else None
  folder = pathlib.Path(source) if hub is None else download(hub)
  path = folder / CONFIG
  if not path.is_file():
    raise CheckpointError(
      f'{folder}: not a checkpoint folder (it has no {CONFIG}). The name of one on the hub is '
      f'written {HUB}owner/name.'
    )
  try:
    config = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise CheckpointError(f'{path}: damaged ({error}).') from error
  if not isinstance(config, dict):
    raise CheckpointError(f'{path}: expected an object, found {type(config).__name__}.')
  where = str(path)
  whole, config = config, hf_model.text_part(where, config)
  pictures = config is not whole
  if pictures:
    _say_text_alone(folder)
  family = hf_model.family_of(where, config)
  model = hf_model.to_model(where, config, family)
  kinds = config.get('architectures') or [family.causal_lm]
  if not isinstance(kinds, list):
    raise CheckpointError(f'{path}: architectures={kinds!r}: expected a list of names.')
  checkpoint = Checkpoint(folder, config, family, model, scores=False, hub=hub, pictures=pictures)
  if family.classifier in kinds:
    labels = config.get('id2label', {'0': '', '1': ''})  # what transformers leaves out
    if not isinstance(labels, Mapping) or len(labels) != 1:
      count = f'{len(labels)} labels' if isinstance(labels, Mapping) else f'id2label={labels!r}'
      raise CheckpointError(
        f'{path}: a classifier with {count}: expected 1 (num_labels=1), the score.'
      )
    return checkpoint.as_scorer()
  return checkpoint


@functools.cache
def _say_text_alone(folder: pathlib.Path) -> None:
  logging.warning('%s: only its text part is read; it sees no pictures.', folder)


def load_decoder(checkpoint: Checkpoint, abstract: Params) -> Params:
  """A policy's parameters, float32, in the shapes and shardings of `abstract`.

  Args:
    checkpoint: from `open_checkpoint`.
    abstract: the tree of `decoder.init` of the same architecture, of `ShapeDtypeStruct`s with
      shardings (without, arrays lie on the default device).

  Raises:
    CheckpointError: tensors are missing, unexpected, or have other shapes; the message names them.
  """
  if checkpoint.scores:
    raise CheckpointError(
      f'{checkpoint.folder}: a {checkpoint.family.classifier}, which scores texts and cannot write '
      'any. Name the checkpoint of a language model.'
    )
  leaves = trees.flatten(abstract)
  sources = _plan(checkpoint, leaves)
  _verify(checkpoint, sources)
  return trees.unflatten(abstract, _load(checkpoint, sources, leaves))


def load_scorer(checkpoint: Checkpoint, abstract: Params, score: Score | None = None) -> Params:
  """A reward model's parameters, float32: the tree of `roles.init_reward_model`.

  The normaliser is the identity; a bias of the score that an export folded away is the head's.

  Args:
    checkpoint: from `open_checkpoint`.
    abstract: as in `load_decoder`.
    score: the head; None: the checkpoint's own.

  Raises:
    CheckpointError: as in `load_decoder`.
  """
  if not checkpoint.scores:
    raise CheckpointError(
      f'{checkpoint.folder}: architectures={checkpoint.config.get("architectures")!r}: expected '
      f'{checkpoint.family.classifier!r} for a reward model, with one label.'
    )
  leaves = trees.flatten({'trunk': abstract['trunk']})
  leaves = {name.removeprefix('trunk.'): leaf for name, leaf in leaves.items()}
  sources = _plan(checkpoint, leaves)
  constants = {
    'head.bias': np.full(1, checkpoint.score_bias if score is None else score.bias, np.float32),
    'normalizer.gain': np.ones((), np.float32),
    'normalizer.bias': np.zeros((), np.float32),
  }
  if score is None:
    sources[SCORE.name] = [Piece('head.kernel', None, SCORE)]
  else:
    constants['head.kernel'] = score.weight.T
  _verify(checkpoint, sources)
  loaded = _load(checkpoint, sources, leaves | {'head.kernel': abstract['head']['kernel']})
  named = trees.flatten(abstract)
  placed = {name: _constant(value, named[name]) for name, value in constants.items()}
  if score is None:
    placed['head.kernel'] = loaded.pop('head.kernel')
  return trees.unflatten(
    abstract, placed | {f'trunk.{name}': leaf for name, leaf in loaded.items()}
  )


def verify(checkpoint: Checkpoint) -> None:
  """Raises CheckpointError unless its files hold the tensors of its config; reads headers alone."""
  abstract = jax.eval_shape(lambda: decoder.init(checkpoint.model, jax.random.key(0)))
  sources = _plan(checkpoint, trees.flatten(abstract))
  if checkpoint.scores:
    sources[SCORE.name] = [Piece('head.kernel', None, SCORE)]
  _verify(checkpoint, sources)


def _plan(checkpoint: Checkpoint, leaves: Mapping[str, Any]) -> dict[str, list[Piece]]:
  where, family = str(checkpoint.folder), checkpoint.family
  return hf_model.plan(family, checkpoint.model.layers, leaves, where)


def _verify(checkpoint: Checkpoint, sources: Mapping[str, list[Piece]]) -> None:
  """Raises CheckpointError unless the files hold just what is needed, in its shapes."""
  where, sizes = checkpoint.folder, hf_layout.axis_sizes(checkpoint.model)
  found = {name: checkpoint.find(name) for name in sources}
  problems = [f'{name} is missing' for name, own in found.items() if own is None]
  for name, own in found.items():
    if own is None:
      continue
    header = checkpoint.headers[own]
    expected = hf_layout.parse(sources[name][0].tensor.layout).their_shape(sizes)
    if header.shape != expected:
      problems.append(f'{own} is {list(header.shape)}, expected {list(expected)}')
    if header.dtype not in DTYPES:
      problems.append(f'{own} is of type {header.dtype}, expected one of {", ".join(DTYPES)}')
  spare = checkpoint.headers.keys() - set(found.values())
  spare -= {SCORE.name} if checkpoint.scores else set()  # another head may be in its place
  problems += [
    f'{name} is unexpected'
    for name in sorted(spare)
    if not ignored(name) and not _repeats_embedding(checkpoint, name)
  ]
  if problems:
    rest = f'; and {len(problems) - 8} more' if len(problems) > 8 else ''
    raise CheckpointError(
      f'{where}: its tensors are not those of its {CONFIG}: {"; ".join(problems[:8])}{rest}.'
    )


def _repeats_embedding(checkpoint: Checkpoint, name: str) -> bool:
  """Whether a tensor is the read-out of a model that reads out with its embeddings.

  Raises CheckpointError if it differs from them: transformers would not tie them then.
  """
  head = checkpoint.family.tensors['unembedding'].name
  embedding = checkpoint.find(checkpoint.family.tensors['embedding'].name)
  if not checkpoint.model.tied_embeddings or embedding is None:
    return False
  if name not in (head, checkpoint.family.aliases.get(head)):
    return False
  if checkpoint.scores:
    return True
  shape = checkpoint.headers[embedding].shape
  same = checkpoint.headers[name].shape == shape
  with open_tensor(checkpoint, embedding) as first, open_tensor(checkpoint, name) as second:
    step = max(1, _CHECKED // shape[-1])
    for row in range(0, shape[0] if same else 0, step):
      rows = slice(row, min(row + step, shape[0]))
      same = same and np.array_equal(first[rows], second[rows])
  if not same:
    raise CheckpointError(
      f'{checkpoint.folder / CONFIG}: tie_word_embeddings=True, yet {name} is not equal to '
      f'{embedding}. Set it to false to use both.'
    )
  return True


@contextlib.contextmanager
def open_tensor(checkpoint: Checkpoint, name: str) -> Iterator[Any]:
  """A tensor of the files, to be sliced; `name` is one of `checkpoint.headers`."""
  import safetensors

  header = checkpoint.headers[name]
  with safetensors.safe_open(header.file, framework='numpy') as file:
    yield file.get_slice(header.name)


def _load(
  checkpoint: Checkpoint, sources: Mapping[str, list[Piece]], leaves: Mapping[str, Any]
) -> dict[str, Any]:
  """The parameters, by name, read file by file."""
  import safetensors

  sizes = hf_layout.axis_sizes(checkpoint.model)
  by_file: dict[pathlib.Path, list[tuple[str, list[Piece]]]] = {}
  for name, pieces in sources.items():
    own = checkpoint.find(name)
    assert own is not None, 'verified'
    header = checkpoint.headers[own]
    by_file.setdefault(header.file, []).append((header.name, pieces))
  loaded: dict[str, Any] = {}
  for path in sorted(by_file):
    with safetensors.safe_open(path, framework='numpy') as file:
      for name, pieces in by_file[path]:
        tensor = file.get_slice(name)
        for piece in pieces:
          hf_place.place(piece, tensor, leaves[piece.param], sizes, loaded)
  return loaded


def _constant(value: np.ndarray, leaf: Any) -> jax.Array:
  return jax.make_array_from_callback(
    value.shape, hf_place.sharding_of(leaf), lambda index: value[index]
  )
