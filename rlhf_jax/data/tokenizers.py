"""Text to token ids and back: tokenizers trained in place, or read from a folder."""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from rlhf_jax.common.errors import DataError
from rlhf_jax.data import templates, tokenizer_folders
from rlhf_jax.data.config import TRAINED_TOKENIZERS
from rlhf_jax.data.tokenizer_folders import CONFIG, GENERATION, TEMPLATE, TOKENIZER
from rlhf_jax.feedback.dialogues import ASSISTANT, USER, Dialogue, Message

PAD, BOS, EOS, UNK = '<pad>', '<bos>', '<eos>', '<unk>'
SPECIAL = (PAD, BOS, EOS, UNK)
_LITERAL = 'literal_text'  # of ours: special tokens in a text are text
_EMBEDDED = 'embedded_ids'  # of ours: `Tokenizer.embedded`
# What templates write for the special tokens of such tokenizers: characters of no text (Unicode's
# noncharacters), which then become the tokens.
_MARKS = {'bos': '\ufdd0', 'eos': '\ufdd1'}
_MARK = re.compile(f'([{"".join(_MARKS.values())}])')
_PROBE = 'Qxz7'


class Encoded(NamedTuple):
  """A rendered text as tokens: ids, and the characters `[start, end)` each was made from.

  A tokenizer may leave white space at the start of a token out of its characters, and tokens that
  share a character have it alike; starts never fall.
  """

  ids: list[int]
  spans: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A tokenizer with the ids that padding, beginning and end have.

  Attributes:
    backend: a `tokenizers.Tokenizer`.
    pad_id: fills up rows; masks say where, so it may be `eos_id`.
    bos_id: begins prompts; None for tokenizers that have no such token.
    eos_id: ends every finished response.
    literal: whether special tokens spelt out in a text are ordinary text (a tokenizer of ours) or
      special (a Hugging Face one, whose chat markup must work).
    template: the chat template, None without one.
    stops: ids that end a response beside `eos_id`: those that the folder's generation config names,
      and what the template writes after an answer.
    begins: whether `bos_id` is put in front of texts. Some Hugging Face tokenizers, like GPT-2's,
      have such a token and do not; templates write theirs themselves.
    embedded: ids below it have embeddings, where special tokens go on beyond those of the model
      (Gemma 3 without pictures has one for a picture); None: all have.
  """

  backend: Any
  pad_id: int
  bos_id: int | None
  eos_id: int
  literal: bool
  template: str | None = None
  stops: tuple[int, ...] = ()
  begins: bool = True
  embedded: int | None = None

  @property
  def start(self) -> list[int]:
    """What stands in front of a text."""
    return [self.bos_id] if self.begins and self.bos_id is not None else []

  @property
  def vocab_size(self) -> int:
    """One more than the largest id."""
    return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

  @property
  def needed_size(self) -> int:
    """`vocab_size` without the special tokens at its end that texts can do without."""
    added = self.backend.get_added_tokens_decoder().items()
    spare = {i for i, token in added if token.special} - {self.pad_id, self.bos_id, self.eos_id}
    return max(set(self.backend.get_vocab(with_added_tokens=True).values()) - spare) + 1

  @property
  def fingerprint(self) -> str:
    """SHA-256 of the tokenizer and its special ids: what the ids of texts mean."""
    ids = json.dumps([self.pad_id, self.bos_id, self.eos_id, self.literal])
    ids += '' if self.begins else ' alone'
    return hashlib.sha256((self.backend.to_str() + ids).encode()).hexdigest()

  @property
  def identity(self) -> str:
    """SHA-256 of all that batches and samples depend on, chat template and stop tokens too."""
    if self.template is None and not self.stops:
      return self.fingerprint
    chat = json.dumps([self.fingerprint, self.template, self.stops])
    return hashlib.sha256(chat.encode()).hexdigest()

  @property
  def stop_ids(self) -> tuple[int, ...]:
    """All ids that end a response."""
    return (self.eos_id, *self.stops)

  def with_template(self, template: str) -> 'Tokenizer':
    """The tokenizer with another chat template, whose end of turn is one more stop token."""
    changed = dataclasses.replace(self, template=template)
    end = changed._end_of_turn()
    if end is None or end in self.stop_ids:
      return changed
    return dataclasses.replace(changed, stops=(*self.stops, end))

  def _end_of_turn(self) -> int | None:
    """The first special token that the template writes after what the assistant has said."""
    try:
      text = self.render((Message(USER, 'Hi'), Message(ASSISTANT, _PROBE)), ask=False)
    except DataError:  # then it is told of the first dialogue; without any, nobody needs it
      return None
    _, found, after = text.rpartition(_PROBE)
    if not found:
      return None
    (encoded,) = self.encode_rendered([after])
    special = {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
    return next((i for i in encoded.ids if i in special), None)

  @property
  def unk_id(self) -> int | None:
    """What stands for all unknown words, where the tokenizer has such a thing."""
    return self.backend.token_to_id(UNK)

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with nothing added at either end.

    Raises DataError for a text with a token that has no embedding.
    """
    return [row.ids for row in self._encode(texts)]

  def encode_with_starts(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """The ids of `encode_batch` and, of each, the number of the character with which it starts.

    Tokens that share a character start with it alike; starts never fall.
    """
    return [(row.ids, [start for start, _ in row.offsets]) for row in self._encode(texts)]

  def _encode(self, texts: Sequence[str]) -> list[Any]:
    rows = self.backend.encode_batch(list(texts), add_special_tokens=False)
    for text, row in zip(texts, rows, strict=True):
      if self.embedded is not None and max(row.ids, default=0) >= self.embedded:
        token = self.backend.id_to_token(max(row.ids))
        raise DataError(
          f'text {text!r:.60}: it has the token {token!r} (id {max(row.ids)}), and the model '
          f'embeddings for {self.embedded} ids. Take it out.'
        )
    return rows

  @property
  def template_tokens(self) -> dict[str, str]:
    """Special tokens by their names in chat templates."""
    if self.literal:
      return {f'{name}_token': mark for name, mark in _MARKS.items()}
    ids = {'pad': self.pad_id, 'bos': self.bos_id, 'eos': self.eos_id}
    return {
      f'{name}_token': self.backend.id_to_token(i) for name, i in ids.items() if i is not None
    }

  def render(self, dialogue: Dialogue, *, ask: bool) -> str:
    """A dialogue as the chat template writes it; `ask` and errors as in `templates.render`."""
    assert self.template is not None, 'data.chat.require_template comes first'
    self._check_marks(dialogue)
    return templates.render(self.template, self.template_tokens, dialogue, ask=ask)

  def written(self, dialogue: Dialogue) -> str:
    """What is asked, as people may read it: as `render` writes it, special tokens spelt out."""
    text = self.render(dialogue, ask=True)
    if not self.literal:
      return text
    ids = {_MARKS['bos']: self.bos_id, _MARKS['eos']: self.eos_id}
    return _MARK.sub(lambda found: self.backend.id_to_token(ids[found.group()]), text)

  def render_turns(self, dialogue: Dialogue, *, prompt: str, asked: int) -> templates.Rendered:
    """A dialogue and where the assistant's turns are; as `templates.render_turns`."""
    assert self.template is not None, 'data.chat.require_template comes first'
    self._check_marks(dialogue)
    return templates.render_turns(
      self.template, self.template_tokens, dialogue, prompt=prompt, asked=asked
    )

  def _check_marks(self, dialogue: Dialogue) -> None:
    for message in dialogue if self.literal else ():
      if _MARK.search(message.content):
        raise DataError(
          f'message {message.content!r:.60}: it has a character that Unicode reserves (U+FDD0 or '
          'U+FDD1), which stands for special tokens here. Take it out.'
        )

  def encode_rendered(self, texts: Sequence[str]) -> list[Encoded]:
    """Rendered texts as tokens, the special ones that the template wrote among them."""
    if not self.literal:
      return [Encoded(row.ids, row.offsets) for row in self._encode(texts)]
    marks = {_MARKS['bos']: self.bos_id, _MARKS['eos']: self.eos_id}
    found = []
    for text in texts:
      ids: list[int] = []
      spans: list[tuple[int, int]] = []
      start = 0
      for piece in _MARK.split(text):
        if piece in marks:
          ids.append(marks[piece])  # type: ignore[arg-type]
          spans.append((start, start + 1))
        elif piece:
          row = self.backend.encode(piece, add_special_tokens=False)
          ids += row.ids
          spans += [(start + first, start + last) for first, last in row.offsets]
        start += len(piece)
      found.append(Encoded(ids, spans))
    return found

  def decode(self, ids: Iterable[int]) -> str:
    """The text of token ids; unknown words are '<unk>'.

    Padding, beginning and end are left out, and so is a stop token in the last place.
    """
    skipped = (self.pad_id, self.bos_id, self.eos_id)
    kept = [int(i) for i in ids if int(i) not in skipped]
    if kept and kept[-1] in self.stops:
      kept = kept[:-1]
    return self.backend.decode(kept, skip_special_tokens=False)

  def save(self, folder: pathlib.Path) -> None:
    """Writes a folder that `load` and Hugging Face's tools read: vocabulary, template, stops."""
    folder.mkdir(parents=True, exist_ok=True)
    self.backend.save(str(folder / TOKENIZER))
    config: dict[str, Any] = {'tokenizer_class': 'PreTrainedTokenizerFast', _LITERAL: self.literal}
    for name in ('pad', 'bos', 'eos'):
      number = getattr(self, f'{name}_id')
      if number is not None:
        config[f'{name}_token'] = self.backend.id_to_token(number)
    if self.bos_id is not None:
      config['add_bos_token'] = self.begins
    if self.embedded is not None:
      config[_EMBEDDED] = self.embedded
    files = {CONFIG: json.dumps(config, indent=2) + '\n'}
    if self.template is not None:
      files[TEMPLATE] = self.template
    if self.stops:
      files[GENERATION] = json.dumps({'eos_token_id': self.stop_ids}) + '\n'
    for file, text in files.items():
      (folder / file).write_text(text, encoding='utf-8')


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
  """Reads a tokenizer folder, ours or one of Hugging Face's, with its chat template.

  Raises:
    DataError: there is no tokenizer, it cannot be read, it is code of its own, a special token that
      it names is not in its vocabulary, or it has no end-of-sequence token.
  """
  import tokenizers as hf

  literal, embedded = False, None
  tokenizer_folders.check_code(folder)
  if (folder / TOKENIZER).is_file():
    try:
      backend = hf.Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # the tokenizers library raises bare Exception
      raise DataError(f'{folder}: not a tokenizer that can be read ({error}).') from error
    said = tokenizer_folders.read_json(folder / CONFIG)
    literal, embedded = bool(said.get(_LITERAL, False)), said.get(_EMBEDDED)
    if embedded is not None and type(embedded) is not int:
      raise DataError(f'{folder / CONFIG}: {_EMBEDDED}={embedded!r:.60}: expected a number of ids.')
    backend.encode_special_tokens = literal
    names = tokenizer_folders.special_tokens(folder)
  else:
    backend, names = tokenizer_folders.convert(folder)
  backend.no_padding()
  backend.no_truncation()
  found = _with_ids(folder, backend, names, literal)
  stops = tuple(i for i in tokenizer_folders.stop_tokens(folder) if i != found.eos_id)
  missing = [number for number in stops if number >= found.vocab_size]
  if missing and (folder / GENERATION).is_file():
    raise DataError(
      f'{folder / GENERATION}: eos_token_id {missing[0]} is not in the vocabulary of '
      f'{found.vocab_size} ids. Mend one of them.'
    )
  stops = tuple(number for number in stops if number not in missing)
  begins = literal or tokenizer_folders.adds_bos(folder, backend, found.bos_id)
  found = dataclasses.replace(found, stops=stops, begins=begins, embedded=embedded)
  template = tokenizer_folders.chat_template(folder)
  return found if template is None else found.with_template(template)


def _with_ids(
  folder: pathlib.Path, backend: Any, names: dict[str, str | None], literal: bool
) -> Tokenizer:
  ids = {
    name: None if token is None else backend.token_to_id(token) for name, token in names.items()
  }
  if ids['eos'] is None:
    raise DataError(
      f'{folder}: its end-of-sequence token is {names["eos"]!r}, which is not in the vocabulary. '
      f'Responses must end: name eos_token in {CONFIG}.'
    )
  for name, number in ids.items():
    if names[name] is not None and number is None:
      raise DataError(
        f'{folder}: its {name}_token is {names[name]!r}, which is not in the vocabulary of '
        f'{TOKENIZER}: there is no id, and no embedding, for it. Name one that is, or null, in '
        f'{CONFIG}.'
      )
  pad = ids['eos'] if ids['pad'] is None else ids['pad']
  return Tokenizer(backend, pad, ids['bos'], ids['eos'], literal)
