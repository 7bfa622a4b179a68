"""Lines with lists of messages say what the same lines with texts would say, turn for turn."""

import json
import pathlib
import re
from typing import Any

import pytest

from rlhf_jax.common.errors import DataError
from rlhf_jax.data import jsonl
from rlhf_jax.data.rejects import Rejects
from rlhf_jax.feedback.dialogues import Message
from rlhf_jax.feedback.records import Comparison, Demonstration, Prompt, Ranking, Rating, StepRating


def _turns(*said: str) -> list[dict[str, str]]:
  """'u:Hi' -> a message of the user."""
  roles = {'s': 'system', 'u': 'user', 'a': 'assistant'}
  return [{'role': roles[text[0]], 'content': text[2:]} for text in said]


def _messages(*said: str) -> tuple[Message, ...]:
  return tuple(Message(**message) for message in _turns(*said))


def _read(tmp_path: Any, *lines: dict[str, Any]) -> list[Any]:
  path = tmp_path / 'data.jsonl'
  path.write_text('\n'.join(map(json.dumps, lines)))
  rejects = Rejects()
  records = jsonl.read(str(path), rejects)
  rejects.settle('strict', None)
  return records


ASKED = _turns('s:Be brief.', 'u:Hi')
CONTEXT = _messages('s:Be brief.', 'u:Hi')
SAID, OTHER = _turns('a:Yo'), _turns('a:Hello')


@pytest.mark.parametrize(
  'line, record',
  [
    ({'prompt': ASKED}, Prompt(CONTEXT)),
    ({'prompt': ASKED, 'response': 'Yo'}, Demonstration(CONTEXT, 'Yo')),
    ({'prompt': ASKED, 'completion': SAID}, Demonstration(CONTEXT, 'Yo')),
    (
      {'prompt': ASKED, 'completion': _turns('a:Yo', 'u:Yo?', 'a:Yo.')},
      Demonstration(CONTEXT, _messages('a:Yo', 'u:Yo?', 'a:Yo.')),
    ),
    ({'messages': ASKED + SAID, 'source': 'web'}, Demonstration(CONTEXT, 'Yo')),
    (
      {'prompt': 'Hi', 'messages': _turns('u:Hi', 'a:Yo', 'u:Yo?', 'a:Yo.')},
      Demonstration(_messages('u:Hi'), _messages('a:Yo', 'u:Yo?', 'a:Yo.')),
    ),
    ({'prompt': ASKED, 'completion': SAID, 'label': True}, Rating(CONTEXT, 'Yo', 1.0)),
    ({'prompt': ASKED, 'response': SAID, 'score': 0.5}, Rating(CONTEXT, 'Yo', 0.5)),
    ({'prompt': ASKED, 'chosen': SAID, 'rejected': OTHER}, Comparison(CONTEXT, 'Yo', 'Hello')),
    ({'prompt': ASKED, 'chosen': 'Yo', 'rejected': 'Hello'}, Comparison(CONTEXT, 'Yo', 'Hello')),
    ({'prompt': 'Hi', 'chosen': SAID, 'rejected': OTHER}, Comparison('Hi', 'Yo', 'Hello')),
    # TRL's form without a prompt, and UltraFeedback's with the question as a text beside.
    ({'chosen': ASKED + SAID, 'rejected': ASKED + OTHER}, Comparison(CONTEXT, 'Yo', 'Hello')),
    (
      {'prompt': 'Hi', 'chosen': ASKED + SAID, 'rejected': ASKED + OTHER, 'messages': ASKED + SAID},
      Comparison(CONTEXT, 'Yo', 'Hello'),
    ),
    (
      {'prompt': ASKED, 'chosen': ASKED + SAID, 'rejected': ASKED + OTHER},
      Comparison(CONTEXT, 'Yo', 'Hello'),
    ),
    (
      {'prompt': ASKED, 'responses': [SAID, OTHER, 'Hm'], 'best': 1},
      Ranking(CONTEXT, ('Yo', 'Hello', 'Hm'), (2, 1, 2)),
    ),
    (
      {'prompt': ASKED, 'steps': ['a', 'b'], 'scores': [1, 0]},
      StepRating(CONTEXT, ('a', 'b'), (1, 0)),
    ),
  ],
)
def test_messages_are_read_where_texts_are(tmp_path, line, record):
  assert _read(tmp_path, line, line) == [record, record]


def test_the_lines_on_the_page_are_read(tmp_path):
  page = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'data.md'
  (block,) = re.findall(r'```jsonl\n(.*?)```', page.read_text('utf-8'), re.DOTALL)
  kinds = []
  for line in block.splitlines():
    (record,) = _read(tmp_path, json.loads(line))
    assert not isinstance(record.text if isinstance(record, Prompt) else record.prompt, str)
    kinds.append(type(record))
  several = [Demonstration, Demonstration, Rating, *[Comparison] * 3, Ranking, Prompt]
  assert kinds == several


@pytest.mark.parametrize(
  'line, message',
  [
    ({'prompt': ASKED + SAID}, "'prompt': ends with the assistant's turn"),
    ({'prompt': _turns('u: ')}, r"'prompt\[0\].content': empty"),
    ({'messages': ASKED}, "'messages': the assistant says nothing"),
    ({'messages': ASKED + SAID + ASKED}, r"'messages\[3\].role': a system message can only be"),
    ({'messages': ASKED + SAID, 'prompt': 'Ho'}, "'prompt': not what is asked in messages"),
    ({'messages': 'Hi'}, "'messages': expected a list of messages, got str"),
    ({'messages': [{'from': 'human', 'value': 'Hi'}]}, r"'messages\[0\].role': missing; the me"),
    ({'prompt': 'Hi', 'completion': _turns('a:a', 'u:b', 'a:c')}, "'prompt': expected messages"),
    ({'prompt': ASKED, 'completion': _turns('u:b')}, "'completion': begins with the user's turn"),
    (
      {'prompt': ASKED, 'completion': _turns('a:a', 'u:b', 'a:c'), 'label': True},
      r"'completion': expected one message of the assistant, got those of \['assistant', 'user'",
    ),
    (
      {'prompt': ASKED, 'responses': [_turns('u:a'), 'b'], 'best': 0},
      r"'responses\[0\]': expected one message of the assistant",
    ),
    ({'prompt': ASKED, 'chosen': SAID, 'rejected': 'b'}, "'rejected': expected a list of messages"),
    ({'prompt': ASKED, 'chosen': SAID, 'rejected': SAID}, "'rejected': the same text as chosen"),
    ({'chosen': ASKED + SAID, 'rejected': ASKED + SAID}, "'rejected': the same dialogue as chosen"),
    ({'chosen': ASKED + SAID, 'rejected': _turns('u:Ho', 'a:b')}, "'rejected': no message in comm"),
    (
      {'chosen': ASKED + SAID, 'rejected': ASKED + _turns('a:a', 'u:b', 'a:c')},
      "'rejected': expected one message of the assistant after the 2 that",
    ),
    (
      {'chosen': ASKED, 'rejected': ASKED + SAID},
      r"'chosen': expected one message .* got those of",
    ),
    (
      {'prompt': 'Ho', 'chosen': ASKED + SAID, 'rejected': ASKED + OTHER},
      "'prompt': not what the dialogues chosen and rejected have in common",
    ),
  ],
)
def test_a_bad_line_is_named_with_field_and_reason(tmp_path, line, message):
  with pytest.raises(DataError, match=f'data.jsonl:1: field {message}'):
    _read(tmp_path, line)
