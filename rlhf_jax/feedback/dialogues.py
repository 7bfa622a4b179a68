"""Dialogues: what was said by whom, and what a prompt or a continuation may consist of."""

import dataclasses
import json
from typing import Any

from rlhf_jax.feedback.checks import RecordError, check_several, check_text

SYSTEM, USER, ASSISTANT, TOOL = ROLES = ('system', 'user', 'assistant', 'tool')
# What a message may hold beside its role and content, and what would be lost without it.
_UNREAD = ('tool_calls', 'function_call', 'reasoning_content', 'thinking')


@dataclasses.dataclass(frozen=True)
class Message:
  """What one side said.

  Attributes:
    role: one of ROLES.
    content: the text, not empty.
  """

  role: str
  content: str


Dialogue = tuple[Message, ...]
# What a response answers: a text to be gone on with, or a dialogue in which the assistant is next.
Context = str | Dialogue
# What answers it: a text, or several turns of which the first and the last are the assistant's.
Reply = str | Dialogue


def is_written(value: object) -> bool:
  """Whether a value from a file, or of a record's `to_dict`, is to be a dialogue."""
  return isinstance(value, list) or isinstance(value, tuple) and not _made(value)


def _made(value: tuple) -> bool:
  return any(isinstance(message, Message) for message in value)


def read(field: str, value: object) -> Dialogue:
  """A list of `{"role": ..., "content": ...}` as messages, checked one by one.

  Raises:
    RecordError: it is no such list, has a role that is not known, a content that is no text or
      empty, a system message after the first place, or tool calls or thoughts, which would be lost.
  """
  if not isinstance(value, list | tuple):
    raise RecordError(field, f'expected a list of messages, got {type(value).__name__}')
  messages = []
  for number, message in enumerate(value):
    place = f'{field}[{number}]'
    if not isinstance(message, dict):
      raise RecordError(
        place, f'expected {{"role": ..., "content": ...}}, got {type(message).__name__}'
      )
    for name in ('role', 'content'):
      if name not in message:
        raise RecordError(f'{place}.{name}', f'missing; the message has {sorted(message)}')
    for name in _UNREAD:
      if message.get(name):
        raise RecordError(f'{place}.{name}', 'not supported: a message is a role and a text')
    messages.append(Message(message['role'], message['content']))
  dialogue = tuple(messages)
  check(field, dialogue)
  return dialogue


def check(field: str, dialogue: object) -> None:
  """Raises RecordError for messages that are none, or that cannot follow each other."""
  check_several(field, dialogue, 1)
  assert isinstance(dialogue, tuple)
  for number, message in enumerate(dialogue):
    place = f'{field}[{number}]'
    if not isinstance(message, Message):
      raise RecordError(place, f'expected a message, got {type(message).__name__}')
    if message.role not in ROLES:
      raise RecordError(f'{place}.role', f'expected one of {ROLES}, got {message.role!r:.60}')
    check_text(f'{place}.content', message.content)
    if not message.content.strip():
      raise RecordError(f'{place}.content', 'empty')
    if message.role == SYSTEM and number:
      raise RecordError(f'{place}.role', 'a system message can only be the first')


def check_context(field: str, value: object) -> None:
  """Demands a text, or a dialogue that waits for the assistant."""
  if not isinstance(value, tuple):
    check_text(field, value)
    return
  check(field, value)
  last = value[-1].role
  if last == ASSISTANT:
    raise RecordError(
      field, "ends with the assistant's turn: nothing is left to answer. Leave it out"
    )
  if last == SYSTEM:
    raise RecordError(field, 'has a system message alone: nobody has asked anything')


def check_turns(field: str, value: Dialogue) -> None:
  """Demands turns that begin and end with the assistant's."""
  check(field, value)
  for number, where in ((0, 'begins'), (-1, 'ends')):
    if value[number].role != ASSISTANT:
      raise RecordError(field, f"{where} with the {value[number].role}'s turn, not the assistant's")


def split(field: str, dialogue: Dialogue) -> tuple[Dialogue, Reply]:
  """A whole dialogue as what was first asked, and all that followed; a text if that is one turn.

  Raises:
    RecordError: the assistant says nothing, speaks first or does not speak last.
  """
  turns = [number for number, message in enumerate(dialogue) if message.role == ASSISTANT]
  if not turns:
    raise RecordError(field, 'the assistant says nothing in it')
  context, reply = dialogue[: turns[0]], dialogue[turns[0] :]
  if not context:
    raise RecordError(field, "begins with the assistant's turn: there is nothing that it answers")
  check_context(field, context)
  check_turns(field, reply)
  return context, single(reply)


def single(turns: Dialogue) -> Reply:
  """The content of a single turn; several turns as they are."""
  return turns[0].content if len(turns) == 1 else turns


def text_of(context: Context) -> str:
  """A text that tells contexts apart and does not change: the text itself, or the messages."""
  if isinstance(context, str):
    return context
  return json.dumps([[message.role, message.content] for message in context])


def contents(dialogue: Dialogue) -> str:
  """What was said, a line a message, without who said it."""
  return '\n'.join(message.content for message in dialogue)


def to_messages(dialogue: Dialogue) -> list[dict[str, Any]]:
  """Messages as they are written in files and given to templates."""
  return [dataclasses.asdict(message) for message in dialogue]
