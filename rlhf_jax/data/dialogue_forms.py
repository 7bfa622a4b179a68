"""Lines of a file whose texts are lists of messages, as TRL and Hugging Face datasets have them."""

from typing import Any

from rlhf_jax.feedback import dialogues
from rlhf_jax.feedback.checks import RecordError
from rlhf_jax.feedback.dialogues import ASSISTANT, USER, Dialogue, Reply

MESSAGES = 'messages'


def whole(fields: dict[str, Any]) -> dict[str, Any]:
  """The fields of a demonstration from `messages`: a dialogue of which every answer is imitated.

  A `prompt` beside it, as some datasets have, must be what is asked in it.
  """
  prompt, response = dialogues.split(MESSAGES, dialogues.read(MESSAGES, fields[MESSAGES]))
  if 'prompt' in fields and not _agrees(fields['prompt'], prompt):
    raise RecordError('prompt', 'not what is asked in messages')
  return {**fields, 'prompt': prompt, 'response': response}


def plain(fields: dict[str, Any], *names: str) -> dict[str, Any]:
  """The fields, with those of `names` that are a list of one message as its text."""
  return {**fields, **{name: _said(name, fields[name]) for name in names}}


def all_plain(fields: dict[str, Any], name: str) -> dict[str, Any]:
  """The fields, with a list of one message as its text wherever it stands in the list `name`."""
  values = fields[name]
  if not isinstance(values, list):
    return fields
  return {**fields, name: [_said(f'{name}[{row}]', value) for row, value in enumerate(values)]}


def turns(name: str, value: object) -> object:
  """What an assistant says, maybe over several turns; what is no list is for the record."""
  if not isinstance(value, list):
    return value
  said = dialogues.read(name, value)
  dialogues.check_turns(name, said)
  reply: Reply = dialogues.single(said)
  return reply


def comparison(fields: dict[str, Any]) -> dict[str, Any]:
  """The fields of a comparison whose two sides are lists of messages or texts.

  The sides are what the assistant said, or whole dialogues: then the messages that they have in
  common are the prompt. A `prompt` beside whole dialogues must agree with that.

  Raises:
    RecordError: the sides have nothing in common, or differ in more than one message.
  """
  sides = ('chosen', 'rejected')
  if not any(isinstance(fields[name], list) for name in sides):
    return fields
  chosen, rejected = (dialogues.read(name, fields[name]) for name in sides)
  if 'prompt' in fields and chosen[0].role == rejected[0].role == ASSISTANT:
    return plain(fields, *sides)
  if chosen == rejected:
    raise RecordError('rejected', 'the same dialogue as chosen: the pair compares nothing')
  shared = 0
  while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
    shared += 1
  if not shared:
    raise RecordError('rejected', 'no message in common with the start of chosen')
  prompt = chosen[:shared]
  rest = {name: side[shared:] for name, side in zip(sides, (chosen, rejected), strict=True)}
  for name, said in rest.items():
    if [message.role for message in said] != [ASSISTANT]:
      raise RecordError(
        name,
        f'expected one message of the assistant after the {shared} that chosen and rejected have '
        f'in common, got those of {[message.role for message in said]}',
      )
  if 'prompt' in fields and not _agrees(fields['prompt'], prompt):
    raise RecordError('prompt', 'not what the dialogues chosen and rejected have in common')
  texts = {name: said[0].content for name, said in rest.items()}
  return {**fields, **texts, 'prompt': prompt}


def _agrees(given: object, prompt: Dialogue) -> bool:
  if isinstance(given, list):
    return dialogues.read('prompt', given) == prompt
  return any(message.role == USER and message.content == given for message in prompt)


def _said(name: str, value: object) -> object:
  if not isinstance(value, list):
    return value
  said = dialogues.read(name, value)
  if [message.role for message in said] != [ASSISTANT]:
    raise RecordError(
      name,
      f'expected one message of the assistant, got those of {[message.role for message in said]}',
    )
  return said[0].content
