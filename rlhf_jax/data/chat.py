"""Dialogues as token ids: prompts that wait for an answer, and the answers to them.

A dialogue is rendered by the tokenizer's chat template and encoded as one text. Its template alone
says where special tokens stand, so there is no second `<bos>`. The prompt is what is encoded at
sampling, up to where the assistant begins; the response is all that follows, with the tokens that
it has in the encoding of the whole.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rlhf_jax.common.errors import ConfigError, DataError
from rlhf_jax.data import templates
from rlhf_jax.data.tokenizers import Encoded, Tokenizer
from rlhf_jax.feedback.dialogues import ASSISTANT, SYSTEM, USER, Dialogue, Message, Reply

# Texts that are encoded together: where each of their tokens stands is large, and soon forgotten.
_CHUNK = 1024


class Asked(NamedTuple):
  """A dialogue that waits for the assistant.

  Attributes:
    dialogue: the messages that are read, those that had to be left out taken away.
    text: how the template writes them, with the beginning of the assistant's turn.
    whole: the ids of the text.
    ids: those of them that there is room for.
    length: how many ids the dialogue had before anything was left out.
  """

  dialogue: Dialogue
  text: str
  whole: list[int]
  ids: list[int]
  length: int


class Said(NamedTuple):
  """What follows a dialogue.

  Attributes:
    ids: its tokens, its end included.
    imitated: of each token, whether the assistant is to learn it.
    starts: of each token, the number of the character of `text` with which it starts.
    text: how the template writes it.
  """

  ids: list[int]
  imitated: list[bool]
  starts: list[int]
  text: str


def require_template(tokenizer: Tokenizer) -> None:
  """Raises ConfigError for a tokenizer that cannot write dialogues."""
  if tokenizer.template is None:
    raise ConfigError(
      'data.chat_template',
      '',
      f"a file with a jinja template, or '{', '.join(templates.BUILT_IN)}'",
      'The records have dialogues (lists of messages), and the tokenizer has no chat template.',
    )


def ask(
  dialogues: Sequence[Dialogue], tokenizer: Tokenizer, room: int, truncation: str
) -> list[Asked]:
  """Dialogues as prompts of at most `room` tokens; `truncation` as in `DataConfig`.

  Raises:
    ConfigError: the tokenizer has no chat template.
    DataError: the template refuses a dialogue.
  """
  require_template(tokenizer)
  found = []
  for start in range(0, len(dialogues), _CHUNK):
    chunk = dialogues[start : start + _CHUNK]
    texts = [tokenizer.render(dialogue, ask=True) for dialogue in chunk]
    for dialogue, text, (ids, _) in zip(
      chunk, texts, tokenizer.encode_rendered(texts), strict=True
    ):
      asked = Asked(dialogue, text, ids, ids, len(ids))
      found.append(_fitted(asked, tokenizer, room, truncation))
  return found


def _fitted(asked: Asked, tokenizer: Tokenizer, room: int, truncation: str) -> Asked:
  if truncation == 'drop_turns':
    for shorter in shortened(asked.dialogue):
      if len(asked.whole) <= room:
        break
      text = tokenizer.render(shorter, ask=True)
      (row,) = tokenizer.encode_rendered([text])
      asked = asked._replace(dialogue=shorter, text=text, whole=row.ids, ids=row.ids)
  if len(asked.whole) <= room:
    return asked
  # What the template begins a text with stays at its beginning.
  begin = asked.whole[:1] if asked.whole[0] == tokenizer.bos_id else []
  rest, room = asked.whole[len(begin) :], room - len(begin)
  return asked._replace(ids=begin + (rest[:room] if truncation == 'keep_start' else rest[-room:]))


def shortened(dialogue: Dialogue) -> Iterator[Dialogue]:
  """The dialogue without its oldest exchange, without its two oldest, and so on.

  An exchange is a question with all that follows up to the next one. The system message stays, and
  so does the last question.
  """
  kept = dialogue[:1] if dialogue[0].role == SYSTEM else ()
  questions = [number for number, message in enumerate(dialogue) if message.role == USER]
  for start in questions[1:]:
    yield kept + dialogue[start:]


def answer(
  prompts: Sequence[Asked], replies: Sequence[Reply], tokenizer: Tokenizer
) -> Iterator[Said]:
  """What follows each prompt: one turn of the assistant, or turns of both sides.

  A turn of the assistant ends with the first stop token in it, or right behind it, where the
  template writes one: what comes after (a line break, say) is not learnt, and after the last turn
  it is left out. Where it writes none, the last turn gets the end-of-sequence token.

  Raises:
    DataError: the template refuses a dialogue, or renders its prompt otherwise once it is answered.
  """
  for start in range(0, len(prompts), _CHUNK):
    chunk = slice(start, start + _CHUNK)
    yield from _answer(prompts[chunk], replies[chunk], tokenizer)


def _answer(
  prompts: Sequence[Asked], replies: Sequence[Reply], tokenizer: Tokenizer
) -> Iterator[Said]:
  found = []
  for prompt, reply in zip(prompts, replies, strict=True):
    turns = (Message(ASSISTANT, reply),) if isinstance(reply, str) else reply
    asked = len(prompt.dialogue)
    dialogue = prompt.dialogue + turns
    rendered = tokenizer.render_turns(dialogue, prompt=prompt.text, asked=asked)
    found.append((dialogue, rendered))
  rows = tokenizer.encode_rendered([rendered.text for _, rendered in found])
  for (dialogue, rendered), prompt, row in zip(found, prompts, rows, strict=True):
    yield _said(dialogue, rendered, prompt, row, tokenizer)


def _said(
  dialogue: Dialogue,
  rendered: templates.Rendered,
  prompt: Asked,
  row: Encoded,
  tokenizer: Tokenizer,
) -> Said:
  start = len(prompt.text)
  ids, spans = _after(prompt, rendered.text, row, tokenizer)
  imitated = [False] * len(ids)
  end, stopped = 0, False
  for first, last in rendered.spans:
    turn = [i for i, span in enumerate(spans) if _within(span, first - start, last - start)]
    if not turn:
      raise DataError(
        f'message {dialogue[-1].content!r:.60}: a turn of the assistant has no tokens of its own. '
        'Give another tokenizer or chat template.'
      )
    end, stopped = _end(ids, turn[0], turn[-1], tokenizer.stop_ids)
    for i in range(turn[0], end):
      imitated[i] = True
  ids, imitated = ids[:end], imitated[:end]
  starts = [first for first, _ in spans[:end]]
  if not stopped:
    ids, imitated = [*ids, tokenizer.eos_id], [*imitated, True]
    starts.append(len(rendered.text) - start)
  return Said(ids, imitated, starts, rendered.text[start:])


def _after(prompt: Asked, text: str, row: Encoded, tokenizer: Tokenizer) -> Encoded:
  """The tokens behind the prompt, with their characters counted from its end.

  Where the encoding of the whole does not begin with that of the prompt (a token reaches over the
  border), the rest is encoded by itself: what is learnt follows the prompt as it is sampled from.
  """
  start, count = len(prompt.text), len(prompt.whole)
  if row.ids[:count] == prompt.whole:
    return Encoded(row.ids[count:], [(a - start, b - start) for a, b in row.spans[count:]])
  (rest,) = tokenizer.encode_rendered([text[start:]])
  return rest


def _within(span: tuple[int, int], first: int, last: int) -> bool:
  """Whether a token is made of characters in `[first, last)` alone.

  A token of white space may have none; it then lies where those before it end.
  """
  return first <= span[0] and span[1] <= last and span[1] > first


def _end(ids: list[int], first: int, last: int, stops: Sequence[int]) -> tuple[int, bool]:
  """One past the last token of a turn, and whether that is a stop token."""
  for i in range(first, min(last + 2, len(ids))):
    if ids[i] in stops:
      return i + 1, True
  return last + 1, False
