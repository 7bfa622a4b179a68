"""Dialogues are checked turn by turn, and records hold them as they hold texts."""

import json
from typing import Any

import pytest

from rlhf_jax.feedback import dialogues
from rlhf_jax.feedback.checks import RecordError
from rlhf_jax.feedback.convert import CONVERTERS
from rlhf_jax.feedback.dialogues import Message
from rlhf_jax.feedback.records import Comparison, Demonstration, Prompt, Ranking, Rating, StepRating

SYSTEM, USER, ANSWER = (
  Message('system', 'Be brief.'),
  Message('user', 'Hi'),
  Message('assistant', 'Yo'),
)
CONTEXT = (SYSTEM, USER)


@pytest.mark.parametrize(
  'record',
  [
    Prompt(CONTEXT),
    Demonstration(CONTEXT, 'Yo'),
    Demonstration((USER,), (ANSWER, USER, ANSWER)),
    Comparison((USER, ANSWER, USER), 'a', 'b', 0.75),
    Rating(CONTEXT, 'Yo', 1.0),
    Ranking(CONTEXT, ('a', 'b'), (1, 2)),
    StepRating(CONTEXT, ('a', 'b'), (1, 0)),
  ],
)
def test_records_with_dialogues_survive_the_way_through_mappings_and_json(record):
  """They stay hashable, so that records of one prompt can be found."""
  assert type(record).from_dict(record.to_dict()) == record
  again = type(record).from_dict(json.loads(json.dumps(record.to_dict())))
  assert again == record and hash(again) == hash(record)


@pytest.mark.parametrize(
  'value, place, reason',
  [
    ([], 'prompt', 'expected at least 1, got 0'),
    (['Hi'], r'prompt\[0\]', 'expected {"role": ..., "content": ...}, got str'),
    ([{'role': 'user'}], r'prompt\[0\].content', 'missing'),
    ([{'content': 'Hi'}], r'prompt\[0\].role', 'missing'),
    ([{'role': 'human', 'content': 'Hi'}], r'prompt\[0\].role', "expected one of .*got 'human'"),
    ([{'role': ['user'], 'content': 'Hi'}], r'prompt\[0\].role', 'expected one of'),
    ([{'role': 'user', 'content': ' \n'}], r'prompt\[0\].content', 'empty'),
    ([{'role': 'user', 'content': None}], r'prompt\[0\].content', 'expected text, got NoneType'),
    ([{'role': 'user', 'content': '\ud800'}], r'prompt\[0\].content', 'half a surrogate pair'),
    (
      [{'role': 'user', 'content': 'a'}, {'role': 'system', 'content': 'b'}],
      r'prompt\[1\].role',
      'a system message can only be the first',
    ),
    (
      [{'role': 'user', 'content': 'a', 'tool_calls': [1]}],
      r'prompt\[0\].tool_calls',
      'not supported',
    ),
    (
      [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}],
      'prompt',
      "ends with the assistant's turn",
    ),
    ([{'role': 'system', 'content': 'a'}], 'prompt', 'a system message alone'),
  ],
)
def test_a_bad_prompt_is_named_by_message_and_reason(value: Any, place: str, reason: str) -> None:
  with pytest.raises(RecordError, match=f"field '{place}': .*{reason}"):
    Rating.from_dict({'prompt': value, 'response': 'a', 'score': 1})


@pytest.mark.parametrize(
  'roles, reason',
  [
    ('user user', 'the assistant says nothing'),
    ('assistant user assistant', "begins with the assistant's turn"),
    ('user assistant user', "ends with the user's turn"),
    ('system assistant', 'a system message alone'),
  ],
)
def test_a_whole_dialogue_is_asked_and_answered(roles: str, reason: str) -> None:
  with pytest.raises(RecordError, match=f"field 'messages': .*{reason}"):
    dialogues.split('messages', tuple(Message(role, 'x') for role in roles.split()))


def test_a_dialogue_is_split_before_the_first_answer():
  assert dialogues.split('messages', (SYSTEM, USER, ANSWER)) == (CONTEXT, 'Yo')
  turns = (ANSWER, USER, ANSWER)
  assert dialogues.split('messages', (*CONTEXT, *turns)) == (CONTEXT, turns)


def test_several_turns_answer_a_dialogue_only():
  with pytest.raises(RecordError, match="field 'prompt': expected messages, as the response is"):
    Demonstration('Hi', (ANSWER, USER, ANSWER))
  with pytest.raises(RecordError, match="field 'response': ends with the user's turn"):
    Demonstration((USER,), (ANSWER, USER))


def test_converters_compare_the_responses_to_one_dialogue():
  ratings = [Rating(CONTEXT, 'a', 1), Rating((USER,), 'b', 2), Rating(CONTEXT, 'c', 3)]
  pairs = CONVERTERS['ratings_to_comparisons'].convert(ratings)
  assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [(CONTEXT, 'c', 'a')]


def test_texts_of_contexts_differ_where_they_differ():
  contexts = ('Hi', (USER,), CONTEXT, (Message('tool', 'Hi'),), (Message('user', 'Ho'),))
  assert len({dialogues.text_of(context) for context in contexts}) == len(contexts)
