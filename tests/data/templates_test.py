"""Templates are rendered as transformers renders them, the same on every day."""

import concurrent.futures
import re
import signal

import pytest

from rlhf_jax.common.errors import ConfigError, DataError
from rlhf_jax.data import templates
from rlhf_jax.feedback.dialogues import Dialogue, to_messages
from tests.data import folders

TALK = folders.dialogue('u:Hi', 'a:Yo', 'u:How?', 'a:So. ')
TOKENS = {'bos_token': '<s>', 'eos_token': '</s>'}


def _rendered(template: str, talk: Dialogue, asked: int) -> templates.Rendered:
  prompt = templates.render(template, TOKENS, talk[:asked], ask=True)
  return templates.render_turns(template, TOKENS, talk, prompt=prompt, asked=asked)


def _turns(template: str, asked: int = 1) -> list[str]:
  text, spans = _rendered(template, TALK, asked)
  return [text[first:last] for first, last in spans]


@pytest.mark.parametrize('make', [folders.gpt2, folders.llama])
@pytest.mark.parametrize('count', [1, 3])
def test_the_text_is_that_of_transformers(tmp_path, make, count):
  theirs = make(tmp_path)
  for ask in (False, True):
    text = theirs.apply_chat_template(
      to_messages(TALK[:count]), tokenize=False, add_generation_prompt=ask
    )
    tokens = theirs.special_tokens_map
    assert templates.render(theirs.chat_template, tokens, TALK[:count], ask=ask) == text


def test_turns_are_told_by_the_keyword_or_by_what_each_adds():
  """The keyword leaves out the line break behind a turn, which the other way cannot."""
  assert _turns(folders.MARKED_CHATML) == ['Yo<|im_end|>', 'So. <|im_end|>']
  assert _turns(folders.CHATML) == ['Yo<|im_end|>\n', 'So. <|im_end|>\n']
  assert _turns(folders.LLAMA) == [' Yo </s>', ' So. </s>']
  assert _turns(templates.PLAIN) == [' Yo</s>', ' So.</s>']
  for template in (folders.MARKED_CHATML, folders.CHATML, templates.PLAIN):
    assert len(_turns(template, asked=3)) == 1


def test_a_template_that_rewrites_what_was_said_is_refused_unless_it_tells_the_turns():
  talk = folders.dialogue('u:Hi', 'a:<t>hm</t>Yo', 'u:How?', 'a:So.')
  with pytest.raises(
    DataError, match="before message 1, the assistant's, otherwise once it follow"
  ):
    _rendered(folders.FORGETFUL, talk, 1)
  marked = folders.FORGETFUL.replace('{{ ', '{% generation %}{{ ').replace(
    ' }}', ' }}{% endgeneration %}'
  )
  assert _rendered(marked, talk, 1).spans


def test_a_keyword_around_nothing_is_an_error():
  template = '{% generation %}{% endgeneration %}' + folders.CHATML
  with pytest.raises(DataError, match="nothing of the assistant's turns in it"):
    _turns(template)


@pytest.mark.parametrize(
  'template, message',
  [
    ('{{ messages[9].content }}', 'UndefinedError'),
    ('{% for %}', 'TemplateSyntaxError'),
    ("{{ raise_exception('no tools') }}", 'refuses it .TemplateError: no tools'),
    ("{{ ''.__class__.__mro__ }}", 'SecurityError'),
  ],
)
def test_what_a_template_refuses_is_told_with_the_dialogue(template, message):
  with pytest.raises(DataError, match=rf"dialogue \(user, .*begins with 'Hi': .*{message}"):
    templates.render(template, {}, TALK, ask=False)


# Ways out of jinja's sandbox that were open in some version of it, or of what it lends out.
ATTACKS = [
  "{{ ''.__class__.__mro__ }}",
  "{{ ''['__class__'].__mro__ }}",
  "{{ (''|attr('__class__')).__mro__ }}",
  "{{ (''|attr('__cla' ~ 'ss__')).__subclasses__() }}",
  "{{ messages|map(attribute='__class__')|map(attribute='__mro__')|list }}",
  "{{ messages|groupby('__class__') }}",
  "{{ '{0.__class__.__mro__}'.format('') }}",
  "{{ '{x.__class__.__mro__}'.format_map({'x': 1}) }}",
  "{{ ''.format.__self__.__class__ }}",
  '{{ raise_exception.__globals__ }}',
  "{{ strftime_now.__globals__['os'] }}",
  '{{ cycler.__init__.__globals__.os }}',
  '{{ namespace.__init__.__globals__ }}',
  '{{ lipsum.__globals__ }}',
  '{{ self.__init__.__globals__ }}',
  '{{ self._TemplateReference__context }}',
  '{{ loop.__class__ }}',
  "{% include '/etc/passwd' %}",
  "{% import 'os' as os %}{{ os }}",
  "{% extends '/etc/passwd' %}",
  '{{ messages.append(messages[0]) }}',
  "{{ messages[0].update({'role': 'assistant'}) }}",
  '{{ range(10**9)|list|length }}',
  "{% generation %}{{ ''.__class__.__mro__ }}{% endgeneration %}",
]


@pytest.mark.parametrize('attack', ATTACKS)
def test_a_template_reaches_nothing_but_the_dialogue(attack):
  """It is refused, or what it reaches for is undefined."""
  try:
    text = templates.render(attack, {}, TALK, ask=False)
  except DataError as error:
    assert 'the chat template refuses it' in str(error)
  else:
    assert not re.search("class '|module '|root:|<function|<frame|object at", text), text


def test_loops_within_loops_end(monkeypatch):
  """Two loops that the sandbox allows take an hour; the alarm is given back as it was."""
  monkeypatch.setattr(templates, '_SECONDS', 0.2)
  loops = '{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}'
  with pytest.raises(DataError, match='TimeoutError: it takes longer than 0.2 seconds'):
    templates.render(loops, {}, TALK, ask=False)
  assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
  assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
  # Somebody else's alarm, and other threads, are left alone.
  monkeypatch.setattr(templates, '_SECONDS', 0.001)
  before = signal.signal(signal.SIGALRM, lambda *_: None)
  slow = '{% for a in range(99999) %}{% endfor %}{{ 1 }}'
  try:
    assert templates.render(slow, {}, TALK, ask=False) == '1'
  finally:
    signal.signal(signal.SIGALRM, before)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    assert pool.submit(templates.render, slow, {}, TALK, ask=False).result() == '1'


def test_the_day_is_always_the_same():
  template = "{{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d') }}"
  assert templates.render(template, {}, TALK, ask=True) == '26 Jul 2024 2024-07-26'


def test_a_template_is_named_by_its_name_or_file(tmp_path):
  (tmp_path / 'x.jinja').write_text('{{ 1 }}')
  assert templates.named(str(tmp_path / 'x.jinja'), 'f') == '{{ 1 }}'
  assert templates.named('plain', 'f') == templates.PLAIN
  with pytest.raises(
    ConfigError, match="data.chat_template='chatty': expected a jinja file, or 'pl"
  ):
    templates.named('chatty', 'data.chat_template')
