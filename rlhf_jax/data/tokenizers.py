"""Text to token ids and back: tokenizers trained in place, or read from a folder."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from rlhf_jax.common.errors import DataError
from rlhf_jax.data.config import TRAINED_TOKENIZERS

PAD, BOS, EOS, UNK = '<pad>', '<bos>', '<eos>', '<unk>'
SPECIAL = (PAD, BOS, EOS, UNK)
_TOKENIZER, _CONFIG = 'tokenizer.json', 'tokenizer_config.json'
_LITERAL = 'literal_text'  # of ours: special tokens in a text are text


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A tokenizer with the ids that padding, beginning and end have.

  Attributes:
    backend: a `tokenizers.Tokenizer`.
    pad_id: fills up rows; masks say where, so it may be `eos_id`.
    bos_id: begins every prompt; None for tokenizers that have no such token.
    eos_id: ends every finished response.
    literal: whether special tokens spelt out in a text are ordinary text (a tokenizer of ours) or
      special (a Hugging Face one, whose chat markup must work).
  """

  backend: Any
  pad_id: int
  bos_id: int | None
  eos_id: int
  literal: bool

  @property
  def vocab_size(self) -> int:
    """One more than the largest id."""
    return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

  @property
  def fingerprint(self) -> str:
    """SHA-256 of the tokenizer and its special ids."""
    ids = json.dumps([self.pad_id, self.bos_id, self.eos_id, self.literal])
    return hashlib.sha256((self.backend.to_str() + ids).encode()).hexdigest()

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with nothing added at either end."""
    return [row.ids for row in self.backend.encode_batch(list(texts), add_special_tokens=False)]

  def encode_with_starts(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """The ids of `encode_batch` and, of each, the number of the character with which it starts.

    Tokens that share a character start with it alike; starts never fall.
    """
    rows = self.backend.encode_batch(list(texts), add_special_tokens=False)
    return [(row.ids, [start for start, _ in row.offsets]) for row in rows]

  def decode(self, ids: Iterable[int]) -> str:
    """The text of token ids; padding, beginning and end are left out, unknown words are '<unk>'."""
    skipped = (self.pad_id, self.bos_id, self.eos_id)
    return self.backend.decode(
      [int(i) for i in ids if int(i) not in skipped], skip_special_tokens=False
    )

  def save(self, folder: pathlib.Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, which Hugging Face tools read too."""
    folder.mkdir(parents=True, exist_ok=True)
    self.backend.save(str(folder / _TOKENIZER))
    config: dict[str, Any] = {'tokenizer_class': 'PreTrainedTokenizerFast', _LITERAL: self.literal}
    for name in ('pad', 'bos', 'eos'):
      number = getattr(self, f'{name}_id')
      if number is not None:
        config[f'{name}_token'] = self.backend.id_to_token(number)
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


def train(kind: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """Trains a tokenizer of at most `vocab_size` tokens, <pad>, <bos>, <eos> and <unk> among them.

  'word': the most frequent strings between white space; decoding joins them by single spaces.
  'byte': byte-level byte-pair encoding; decoding gives back any text exactly.
  """
  import tokenizers as hf

  backend: Any
  trainer: Any
  if kind == 'word':
    backend = hf.Tokenizer(hf.models.WordLevel(unk_token=UNK))
    backend.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    # The vocabulary holds the special tokens: a text that spells one must not become it.
    backend.normalizer = hf.normalizers.Replace(hf.Regex('<(pad|bos|eos)>'), UNK)
    trainer = hf.trainers.WordLevelTrainer(
      vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False
    )
  elif kind == 'byte':
    backend = hf.Tokenizer(hf.models.BPE())
    backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
      vocab_size=vocab_size,
      special_tokens=list(SPECIAL),
      initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
      show_progress=False,
    )
  else:
    raise ValueError(f'kind: expected one of {TRAINED_TOKENIZERS}, got {kind!r}.')
  backend.train_from_iterator(texts, trainer)
  backend.encode_special_tokens = True
  return Tokenizer(
    backend, SPECIAL.index(PAD), SPECIAL.index(BOS), SPECIAL.index(EOS), literal=True
  )


def load(folder: pathlib.Path) -> Tokenizer:
  """Reads a tokenizer folder, ours or one of Hugging Face's.

  Raises:
    DataError: there is no tokenizer, it cannot be read, or it has no end-of-sequence token.
  """
  import tokenizers as hf

  if not (folder / _TOKENIZER).is_file():
    return _load_slow(folder)
  try:
    backend = hf.Tokenizer.from_file(str(folder / _TOKENIZER))
    config_file = folder / _CONFIG
    config = json.loads(config_file.read_text(encoding='utf-8')) if config_file.is_file() else {}
  except Exception as error:  # the tokenizers library raises bare Exception
    raise DataError(f'{folder}: not a tokenizer that can be read ({error}).') from error
  literal = bool(config.get(_LITERAL, False))
  backend.encode_special_tokens = literal
  backend.no_padding()
  backend.no_truncation()
  tokens = {name: config.get(f'{name}_token') for name in ('pad', 'bos', 'eos')}
  # Hugging Face writes a token as a string, or as an object with its properties.
  names = {name: x['content'] if isinstance(x, dict) else x for name, x in tokens.items()}
  return _with_ids(folder, backend, names, literal)


def _load_slow(folder: pathlib.Path) -> Tokenizer:
  """Folders without `tokenizer.json`: transformers knows how to convert their vocabularies."""
  if not folder.is_dir():
    raise DataError(
      f"{folder}: no such folder. --config.data.tokenizer is 'word', 'byte' or a folder."
    )
  import transformers

  try:
    converted = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    backend = converted.backend_tokenizer
  except Exception as error:  # whatever transformers meets in a foreign folder
    first = str(error).strip().partition('\n')[0]
    raise DataError(
      f'{folder}: no {_TOKENIZER}, and transformers cannot read a tokenizer from it ({first}).'
    ) from error
  names = {name: getattr(converted, f'{name}_token') for name in ('pad', 'bos', 'eos')}
  return _with_ids(folder, backend, names, literal=False)


def _with_ids(
  folder: pathlib.Path, backend: Any, names: dict[str, str | None], literal: bool
) -> Tokenizer:
  ids = {
    name: None if token is None else backend.token_to_id(token) for name, token in names.items()
  }
  if ids['eos'] is None:
    raise DataError(
      f'{folder}: its end-of-sequence token is {names["eos"]!r}, which is not in the vocabulary. '
      f'Responses must end: name eos_token in {_CONFIG}.'
    )
  pad = ids['eos'] if ids['pad'] is None else ids['pad']
  return Tokenizer(backend, pad, ids['bos'], ids['eos'], literal)
