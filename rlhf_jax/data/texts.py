"""What is asked and what is answered as token ids, texts and dialogues alike."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rlhf_jax.common.errors import DataError
from rlhf_jax.data import chat
from rlhf_jax.data.config import DataConfig
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.feedback.dialogues import Context, Reply, text_of


class EncodedPrompt(NamedTuple):
  """A prompt as tokens.

  Attributes:
    ids: those that there is room for, `<bos>` included where it has one.
    cut: how many others were left out.
    asked: the dialogue that it is, None for a text.
  """

  ids: list[int]
  cut: int
  asked: chat.Asked | None


class EncodedReply(NamedTuple):
  """A response as tokens.

  Attributes:
    ids: its tokens and its end, not cut.
    imitated: of each, whether it is to be imitated; None where that are all.
    starts: of each, the number of the character of the response with which it starts; empty where
      nobody asks.
  """

  ids: list[int]
  imitated: list[bool] | None
  starts: list[int]

  @property
  def counted(self) -> Sequence[bool]:
    """Of each token, whether it is to be imitated."""
    return [True] * len(self.ids) if self.imitated is None else self.imitated


def encode_contexts(
  contexts: Sequence[Context], tokenizer: Tokenizer, config: DataConfig
) -> list[EncodedPrompt]:
  """Prompts cut to `config.prompt_length`; a text has `<bos>` in front if the tokenizer says so.

  Raises:
    ConfigError: there are dialogues, and the tokenizer has no chat template.
    DataError: a prompt has no tokens at all, or the template refuses it.
  """
  begin = tokenizer.start
  room = config.prompt_length - len(begin)
  texts = [context for context in contexts if isinstance(context, str)]
  encoded = iter(tokenizer.encode_batch(texts))
  dialogues = [context for context in contexts if not isinstance(context, str)]
  asked: Iterator[chat.Asked] = iter(())
  if dialogues:
    asked = iter(chat.ask(dialogues, tokenizer, config.prompt_length, config.truncation))
  found = []
  for context in contexts:
    if isinstance(context, str):
      row = next(encoded)
      kept = row[:room] if config.truncation == 'keep_start' else row[max(len(row) - room, 0) :]
      prompt = EncodedPrompt(begin + kept, len(row) - len(kept), None)
    else:
      one = next(asked)
      prompt = EncodedPrompt(one.ids, one.length - len(one.ids), one)
    if not prompt.ids:
      raise DataError(
        f'prompt {text_of(context)!r:.60}: no tokens, and the tokenizer has no <bos> to begin '
        'with. Give prompts that are not empty, or a tokenizer with a bos_token.'
      )
    found.append(prompt)
  return found


def encode_replies(
  prompts: Sequence[EncodedPrompt],
  replies: Sequence[Sequence[Reply]],
  tokenizer: Tokenizer,
  *,
  with_starts: bool = False,
) -> list[EncodedReply]:
  """The replies to each prompt, one after the other.

  What answers a text ends with the end-of-sequence token; what answers a dialogue as the chat
  template ends it.

  Raises:
    DataError: the chat template refuses an answer, or writes its prompt otherwise beside it; with
      `with_starts`, it changes the answer.
  """
  rows = [
    (prompt.asked, reply)
    for prompt, several in zip(prompts, replies, strict=bool(replies))
    for reply in several
  ]
  plain = [reply for asked, reply in rows if asked is None and isinstance(reply, str)]
  encoded: Iterator[tuple[list[int], list[int]]]
  if with_starts:
    encoded = iter(tokenizer.encode_with_starts(plain))
  else:
    encoded = ((ids, []) for ids in tokenizer.encode_batch(plain))
  in_dialogues = [(asked, reply) for asked, reply in rows if asked is not None]
  said = chat.answer(
    [asked for asked, _ in in_dialogues], [reply for _, reply in in_dialogues], tokenizer
  )
  found = []
  for asked, reply in rows:
    if asked is None:
      ids, starts = next(encoded)
      found.append(EncodedReply([*ids, tokenizer.eos_id], None, starts))
      continue
    one = next(said)
    starts = _from_reply(one, reply) if with_starts else []
    found.append(EncodedReply(one.ids, None if all(one.imitated) else one.imitated, starts))
  return found


def _from_reply(said: chat.Said, reply: Reply) -> list[int]:
  """Where tokens start, counted from the first character of what was said."""
  assert isinstance(reply, str), 'steps are of one turn'
  place = said.text.find(reply)
  if place < 0:
    raise DataError(
      f'response {reply!r:.60}: the chat template changes it, so that its steps cannot be found. '
      'Take white space off its ends, or give another template.'
    )
  return [start - place for start in said.starts]
