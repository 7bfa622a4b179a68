"""Dialogues have the tokens that they are sampled with, and only the assistant's are learnt."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest

from rlhf_jax.common.errors import ConfigError, DataError
from rlhf_jax.data import pipeline, templates, tokenizers
from rlhf_jax.data.config import DataConfig
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.feedback.dialogues import Dialogue, to_messages
from rlhf_jax.feedback.records import Comparison, Demonstration, Prompt, Ranking, Rating, StepRating
from tests.data import folders
from tests.data.folders import CHATML, LLAMA, MARKED_CHATML, dialogue

CONFIG = DataConfig(prompt_length=64, response_length=96, tokenizer='byte')
TALK = dialogue('s:Be brief.', 'u:Hello  there', 'a:I am fine. ☺', 'u:And you?', 'a:twice')
LLAMA_TALK = TALK[1:]


@pytest.fixture(scope='module')
def made(tmp_path_factory: Any) -> Any:
  """Folders by name, each with the tokenizer that transformers has for it."""
  found = {}
  for name, make, template in (
    ('chatml', folders.gpt2, CHATML),
    ('marked', folders.gpt2, MARKED_CHATML),
    ('llama', folders.llama, LLAMA),
    ('plain', folders.gpt2, templates.PLAIN),
  ):
    folder = tmp_path_factory.mktemp(name)
    found[name] = (make(folder, template), tokenizers.load(folder))
  return found


def _talk(name: str) -> Dialogue:
  return LLAMA_TALK if name == 'llama' else TALK


def _row(columns: pipeline.Columns, row: int = 0) -> Any:
  return columns.take(np.array([row]))


def _parts(batch: Any) -> tuple[list[int], list[int], list[bool]]:
  """The real tokens of prompt and response of a batch of one, and which are imitated."""
  real = batch.response_mask[0]
  prompt = batch.prompt[0][batch.prompt_mask[0]].tolist()
  return prompt, batch.response[0][real].tolist(), batch.imitated[0][real].tolist()


def _demonstration(talk: Dialogue, tokenizer: Tokenizer, config: DataConfig = CONFIG) -> Any:
  first = next(i for i, message in enumerate(talk) if message.role == 'assistant')
  reply = talk[first:]
  record = Demonstration(talk[:first], reply if len(reply) > 1 else reply[0].content)
  return _row(pipeline.encode_demonstrations([record], tokenizer, config))


@pytest.mark.parametrize('name', ['chatml', 'marked', 'llama', 'plain'])
def test_prompt_and_response_are_the_tokens_that_transformers_gives_the_whole(made, name):
  """The prompt is what is sampled from; there is one `<bos>` where the template writes one."""
  theirs, ours = made[name]
  talk = _talk(name)
  prompt, response, _ = _parts(_demonstration(talk, ours))
  first = next(i for i, message in enumerate(talk) if message.role == 'assistant')
  asked = theirs.apply_chat_template(
    to_messages(talk[:first]), add_generation_prompt=True, return_dict=False
  )
  whole = theirs.apply_chat_template(to_messages(talk), return_dict=False)
  assert prompt == asked
  behind = whole[len(prompt) + len(response) :]
  assert prompt + response == whole[: len(whole) - len(behind)]
  assert theirs.decode(behind).strip() == ''  # a line break behind the last turn
  assert (prompt + response)[-1] in ours.stop_ids
  bos = prompt.count(ours.bos_id)
  assert bos == (name in ('llama', 'plain')) and (not bos or prompt[0] == ours.bos_id)


def test_the_mask_is_that_of_transformers(made):
  """Where the template marks the turns; it says that the stop token is learnt too."""
  theirs, ours = made['marked']
  prompt, response, imitated = _parts(_demonstration(TALK, ours))
  whole = theirs.apply_chat_template(
    to_messages(TALK), return_dict=True, return_assistant_tokens_mask=True
  )
  mask = [False] * len(prompt) + imitated
  assert mask == [bool(x) for x in whole['assistant_masks'][: len(mask)]]
  assert not any(whole['assistant_masks'][len(mask) :])


@pytest.mark.parametrize('name', ['chatml', 'marked', 'llama', 'plain'])
def test_exactly_what_the_assistant_said_is_imitated(made, name):
  """Each run of imitated tokens is a turn of the assistant and its stop token, no more, no less."""
  _, ours = made[name]
  talk = _talk(name)
  _, response, imitated = _parts(_demonstration(talk, ours))
  runs: list[list[int]] = []
  for i, (token, learnt) in enumerate(zip(response, imitated, strict=True)):
    if learnt and (not i or not imitated[i - 1]):
      runs.append([])
    if learnt:
      runs[-1].append(token)
  said = [message.content for message in talk if message.role == 'assistant']
  assert [ours.backend.decode(run[:-1]).strip() for run in runs] == said
  assert all(run[-1] in ours.stop_ids for run in runs)
  assert not set(run[-1] for run in runs) & {t for run in runs for t in run[:-1]}


def test_marking_the_turns_changes_nothing(made):
  """The fallback by prefixes finds the tokens that `{% generation %}` marks."""
  (_, told), (_, found) = made['marked'], made['chatml']
  assert _parts(_demonstration(TALK, told)) == _parts(_demonstration(TALK, found))


def test_a_mark_that_leaves_out_the_stop_token_does_not_unlearn_stopping(made):
  template = MARKED_CHATML.replace(
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}",
    "{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}",
  )
  assert template != MARKED_CHATML
  _, ours = made['marked']
  changed = ours.with_template(template)
  assert _parts(_demonstration(TALK, changed)) == _parts(_demonstration(TALK, ours))


def test_one_answer_needs_no_mask(made):
  _, ours = made['chatml']
  assert _demonstration(TALK[:3], ours).loss_mask is None
  assert _demonstration(TALK, ours).loss_mask.dtype == bool


def test_texts_beside_dialogues_are_imitated_whole(made):
  _, ours = made['chatml']
  records = [Demonstration('Hello', ' there'), Demonstration(TALK[:2], TALK[2:])]
  columns = pipeline.encode_demonstrations(records, ours, CONFIG)
  text = _row(columns, 0)
  np.testing.assert_array_equal(text.loss_mask, text.response_mask)
  assert _parts(text)[1] == [*ours.encode_batch([' there'])[0], ours.eos_id]
  assert _parts(_row(columns, 1)) == _parts(_demonstration(TALK, ours))


def test_an_answer_without_a_stop_token_gets_the_end_of_sequence(made):
  theirs, ours = made['chatml']
  template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
  changed = dataclasses.replace(ours, template=template, stops=())
  _, response, imitated = _parts(_demonstration(TALK[:3], changed))
  assert theirs.decode(response[:-1]) == 'assistant: I am fine. ☺\n'
  assert response[-1] == ours.eos_id and imitated[-1]


@pytest.mark.parametrize('name', ['chatml', 'llama'])
def test_a_cut_answer_has_no_end(made, name):
  _, ours = made[name]
  config = dataclasses.replace(CONFIG, response_length=3)
  whole = _parts(_demonstration(_talk(name), ours))[1]
  assert _parts(_demonstration(_talk(name), ours, config))[1] == whole[:3]


def test_masks_come_from_lengths_where_padding_is_the_end(made):
  """The end of the answer is real, the padding behind it, the same token, is not."""
  _, ours = made['llama']
  same = dataclasses.replace(ours, pad_id=ours.eos_id)
  batch = _demonstration(LLAMA_TALK, same)
  count = int(batch.response_mask.sum())
  assert batch.response[0, count - 1] == batch.response[0, count] == ours.eos_id
  assert batch.response_mask[0, count - 1] and not batch.response_mask[0, count:].any()
  assert not (batch.loss_mask & ~batch.response_mask).any()


def test_other_records_have_the_prompt_and_the_answers_of_demonstrations(made):
  _, ours = made['chatml']
  prompt, said = TALK[:2], [message.content for message in (TALK[2], TALK[4])]
  single = [_demonstration((*prompt, TALK[i]), ours) for i in (2, 4)]
  expected = [one.response[0].tolist() for one in single]
  compared = Comparison(prompt, said[0], said[1])
  pair = _row(pipeline.encode_comparisons([compared], ours, CONFIG))
  assert pair.sequences.response[0].tolist() == expected
  ranked = _row(pipeline.encode_rankings([Ranking(prompt, tuple(said), (1, 2))], ours, CONFIG))
  assert ranked.sequences.response[0].tolist() == expected
  rated = _row(pipeline.encode_ratings([Rating(prompt, said[0], 1)], ours, CONFIG))
  assert rated.sequences.response.tolist() == expected[:1]
  asked = _row(pipeline.encode_prompts([Prompt(prompt)], ours, CONFIG))
  for sequences in (pair.sequences, ranked.sequences):
    np.testing.assert_array_equal(sequences.prompt[0], asked.tokens)
  assert pair.sequences.loss_mask is None


@pytest.mark.parametrize('name', ['chatml', 'llama', 'plain'])
def test_steps_of_an_answer_are_scored_at_their_last_tokens(made, name):
  theirs, ours = made[name]
  record = StepRating(_talk(name)[:-3], ('Be brief', 'I am', 'fine'), (1, 2, 3))
  batch = _row(pipeline.encode_step_ratings([record], ours, CONFIG))
  tokens, mask = batch.sequences.response[0], batch.score_mask[0]
  texts = [theirs.decode(tokens[: place + 1]).strip() for place in np.flatnonzero(mask)]
  assert texts == ['Be brief', 'Be brief I am', 'Be brief I am fine']
  assert batch.score[0][mask].tolist() == [1, 2, 3]


def _asked(talk: Dialogue, tokenizer: Tokenizer, room: int, truncation: str = 'drop_turns') -> Any:
  config = dataclasses.replace(CONFIG, prompt_length=room, truncation=truncation)
  columns = pipeline.encode_prompts([Prompt(talk)], tokenizer, config)
  batch = _row(columns)
  return batch.tokens[0][batch.mask[0]].tolist(), columns.statistics['prompts_cut']


LONG = (*TALK, *dialogue('u:I am', 'a:you are', 'u:fine?'))
KEPT = [LONG, (LONG[0], *LONG[3:]), (LONG[0], *LONG[5:]), (LONG[0], LONG[7])]


def test_the_oldest_turns_are_dropped_whole_until_the_rest_fits(made):
  """System message and last question stay; of what is still too long the end is kept."""
  _, ours = made['chatml']
  sizes = [len(_asked(talk, ours, 500)[0]) for talk in KEPT]
  assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
  for room in range(sizes[-1] - 3, sizes[0] + 2):
    tokens, cut = _asked(LONG, ours, room)
    kept = next((talk for talk, size in zip(KEPT, sizes, strict=True) if size <= room), KEPT[-1])
    assert tokens == _asked(kept, ours, 500)[0][-room:] and len(tokens) <= room
    assert cut == (kept != LONG or len(tokens) < sizes[-1])


def test_a_dialogue_without_a_system_message_goes_on_with_a_question(made):
  """Roles still alternate, as Llama's template demands; the `<bos>` stays where tokens are cut."""
  _, ours = made['llama']
  talk = LONG[1:]
  rest = _asked(talk[4:], ours, 500)[0]
  assert _asked(talk, ours, len(rest))[0] == rest
  question = _asked(talk[6:], ours, 500)[0]
  assert _asked(talk, ours, len(question) - 2)[0] == [ours.bos_id, *question[3:]]


@pytest.mark.parametrize('truncation', ['keep_end', 'keep_start'])
def test_other_truncations_count_tokens(made, truncation):
  _, ours = made['chatml']
  whole = _asked(LONG, ours, 500)[0]
  kept = whole[-20:] if truncation == 'keep_end' else whole[:20]
  assert _asked(LONG, ours, 20, truncation) == (kept, 1)


def test_answers_follow_the_turns_that_were_kept(made):
  _, ours = made['chatml']
  config = dataclasses.replace(CONFIG, prompt_length=40)
  pair = Comparison(LONG, 'Hello', 'there')
  cut = _row(pipeline.encode_comparisons([pair], ours, config)).sequences
  whole = _row(pipeline.encode_comparisons([pair], ours, DataConfig(prompt_length=500))).sequences
  np.testing.assert_array_equal(cut.response[..., :16], whole.response)
  assert cut.prompt_mask.sum() < whole.prompt_mask.sum()


def test_a_template_that_rewrites_its_prompt_is_refused(made):
  """One that begins an answer with a thought which it then leaves out."""
  _, ours = made['chatml']
  thinking = ours.with_template(
    CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<t>' }}{% endif")
  )
  assert thinking.template != CHATML
  for records in ([Demonstration(TALK[:2], 'a')], [Demonstration(TALK[:2], TALK[2:])]):
    with pytest.raises(DataError, match="before message 2, the assistant's, otherwise"):
      pipeline.encode_demonstrations(records, thinking, CONFIG)


def test_the_built_in_template_is_as_the_page_on_data_shows_it():
  page = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'data.md'
  shown = page.read_text('utf-8').partition('among them:\n\n')[2].partition('\n\nA run')[0]
  ours = tokenizers.train('byte', ['x'], 300).with_template(templates.PLAIN)
  talk = dialogue('s:Be brief.', 'u:How?', 'a:So.', 'u:Why?')
  assert ours.written(talk) == '\n'.join(line[4:] for line in shown.splitlines())


def test_dialogues_need_a_template(tmp_path):
  folders.gpt2(tmp_path, None)
  with pytest.raises(ConfigError, match="data.chat_template='': expected a file.*or 'plain'"):
    pipeline.encode_prompts([Prompt(TALK[:2])], tokenizers.load(tmp_path), CONFIG)


def test_a_token_across_the_border_is_learnt_as_it_is_sampled():
  """'ab' is one token of the whole; the prompt is 'a' then as at sampling, and 'b' its answer."""
  byte = tokenizers.train('byte', ['xab xab xab'] * 9, 270)
  joined = byte.with_template('{% for m in messages %}{{ m.content }}{% endfor %}')
  (whole,) = joined.encode_batch(['xab'])
  prompt, response, _ = _parts(_demonstration(dialogue('u:xa', 'a:b'), joined))
  assert prompt + response[:-1] != whole
  assert (joined.decode(prompt), joined.decode(response)) == ('xa', 'b')
  assert [prompt] == joined.encode_batch(['xa']) and response[-1] == joined.eos_id


@pytest.mark.parametrize('kind', ['byte', 'word'])
def test_trained_tokenizers_write_dialogues_plainly(kind):
  """Special tokens that the template writes are tokens; spelt out by a person they are text."""
  words = 'System: Human: Assistant: Be brief. Hello there twice <eos>'
  ours = tokenizers.train(kind, [words] * 3, 300).with_template(templates.PLAIN)
  talk = dialogue('s:Be brief.', 'u:Hello <eos> there', 'a:twice', 'u:Hello', 'a:there')
  prompt, response, imitated = _parts(_demonstration(talk, ours))
  assert prompt[0] == ours.bos_id and ours.eos_id not in prompt
  assert [i for i, token in enumerate(response) if token == ours.eos_id] == [
    i for i, learnt in enumerate(imitated) if learnt and not (imitated + [False])[i + 1]
  ]
  assert sum(token == ours.eos_id for token in response) == 2 and response[-1] == ours.eos_id
  shown = '<eos>' if kind == 'byte' else '<unk>'
  text = f'System: Be brief. Human: Hello {shown} there Assistant: twice Human: Hello'
  assert ours.decode(prompt + response).split() == [*text.split(), 'Assistant:', 'there']
  assert ours.written(talk[:2]).startswith('<bos>\n\nSystem: Be brief.')
  with pytest.raises(DataError, match='character that Unicode reserves'):
    ours.render(dialogue('u:a\ufdd1b'), ask=True)
