"""Chat templates: from dialogues to text, in the sandbox of transformers."""

import contextlib
import pathlib
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rlhf_jax.common.errors import ConfigError, DataError
from rlhf_jax.feedback.dialogues import Dialogue, to_messages

# For tokenizers without a template. The answer begins with its space, as in the HH transcripts, so
# that byte-level tokenizers have its first word as they have it elsewhere.
PLAIN = (
  "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
  "{{ '\\n\\nAssistant:' }}"
  "{% generation %}{{ ' ' + message.content | trim + eos_token }}{% endgeneration %}"
  "{% else %}{{ '\\n\\n' + {'system': 'System', 'user': 'Human', 'tool': 'Tool'}[message.role] }}"
  "{{ ': ' + message.content | trim }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
BUILT_IN = {'plain': PLAIN}

# Some templates write the day on which they are rendered. A run that is resumed on another day, or
# repeated, must read the same tokens: for them it is always the default day of Llama 3.1's.
_TODAY = (
  '{% macro strftime_now(format) %}'
  "{{ {'%Y-%m-%d': '2024-07-26'}.get(format, '26 Jul 2024') }}{% endmacro %}"
)
# The sandbox bounds a loop, not loops within loops; real templates take a few milliseconds.
_SECONDS = 30.0
_GENERATION = re.compile(r'\{%-?\s*generation\s*-?%\}')


class Rendered(NamedTuple):
  """A dialogue as text.

  Attributes:
    text: the text.
    spans: first and one past the last character of each turn that the assistant is to learn.
  """

  text: str
  spans: list[tuple[int, int]]


def named(name: str, field: str) -> str:
  """The template of `data.chat_template`: a built-in one's name, or a file.

  Raises:
    ConfigError: there is no such file, or it cannot be read.
  """
  if name in BUILT_IN:
    return BUILT_IN[name]
  try:
    return pathlib.Path(name).read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(
      field, name, f"a jinja file, or '{', '.join(BUILT_IN)}'", f'It cannot be read ({error}).'
    ) from error


def render(template: str, tokens: Mapping[str, str], dialogue: Dialogue, *, ask: bool) -> str:
  """A dialogue as text, up to where the assistant goes on if `ask`.

  Args:
    template: in jinja.
    tokens: special tokens by their names in templates, such as 'bos_token'.
    dialogue: the messages.
    ask: whether what begins the assistant's turn is to follow (`add_generation_prompt`).

  Raises:
    DataError: the template refuses the dialogue, or cannot be rendered at all.
  """
  return _render(template, tokens, dialogue, ask=ask, marked=False)[0]


def render_turns(
  template: str, tokens: Mapping[str, str], dialogue: Dialogue, *, prompt: str, asked: int
) -> Rendered:
  """A dialogue as text, and where in it the assistant's turns from message `asked` on stand.

  A template says where with `{% generation %}`. For one that does not, a turn is what the rendering
  of the messages up to it adds to that of the messages before it with the beginning of an
  assistant's turn; so every such rendering must be how the next one begins.

  Args:
    template: in jinja.
    tokens: special tokens by their names in templates.
    dialogue: the messages, the last of them the assistant's.
    prompt: what `render` gives of those before `asked`, with `ask`.
    asked: the number of the first message that is the assistant's to learn.

  Raises:
    DataError: the template refuses the dialogue, has no turn of the assistant between its
      `{% generation %}` and end, or renders earlier messages otherwise once more follow.
  """
  marked = _GENERATION.search(template) is not None
  text, spans = _render(template, tokens, dialogue, ask=False, marked=marked)
  if not text.startswith(prompt):
    raise _not_a_prefix(dialogue, asked)
  if marked:
    start = len(prompt)
    spans = [(max(first, start), last) for first, last in spans if last > start]
    if not spans:
      raise DataError(
        f'{_shown(dialogue)}: the chat template has {{% generation %}}, and nothing of the '
        "assistant's turns in it. Mend the template: all that the assistant says belongs there."
      )
    return Rendered(text, spans)
  last = len(dialogue) - 1
  for number in range(asked, len(dialogue)):
    if dialogue[number].role != 'assistant':
      continue
    before, through = prompt, text
    if number > asked:
      before = render(template, tokens, dialogue[:number], ask=True)
    if number < last:
      through = render(template, tokens, dialogue[: number + 1], ask=False)
    if not (through.startswith(before) and text.startswith(through)):
      raise _not_a_prefix(dialogue, number)
    spans.append((len(before), len(through)))
  return Rendered(text, spans)


def _not_a_prefix(dialogue: Dialogue, number: int) -> DataError:
  """The error about a template that renders messages otherwise once the assistant has spoken."""
  return DataError(
    f'{_shown(dialogue)}: the chat template renders the messages before message {number}, the '
    "assistant's, otherwise once it follows (templates that drop earlier thoughts do, and those "
    'that begin an answer with one), so that what the assistant is to learn cannot be told, or is '
    'not what it would be asked. Give a template that only adds to what it has written: '
    '--config.data.chat_template=FILE.jinja.'
  )


def _render(
  template: str, tokens: Mapping[str, str], dialogue: Dialogue, *, ask: bool, marked: bool
) -> tuple[str, list[tuple[int, int]]]:
  from transformers.utils.chat_template_utils import render_jinja_template

  render_jinja: Any = render_jinja_template  # its annotations are not what it takes and gives
  try:
    with _limited(_SECONDS):
      texts, spans = render_jinja(
        [to_messages(dialogue)],
        chat_template=(_TODAY + template) if 'strftime_now' in template else template,
        return_assistant_tokens_mask=marked,
        add_generation_prompt=ask,
        **tokens,
      )
  except ImportError:  # jinja2 is missing: transformers says so
    raise
  except Exception as error:  # whatever a foreign template meets
    reason = str(error).strip().partition('\n')[0]
    raise DataError(
      f'{_shown(dialogue)}: the chat template refuses it ({type(error).__name__}: {reason}). Mend '
      'the record, or name another template: --config.data.chat_template=FILE.jinja.'
    ) from error
  return texts[0], list(spans[0]) if marked else []


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
  """Raises TimeoutError in what takes longer.

  Only the main thread can be interrupted, and only where nobody else has set the alarm.
  """

  def stop(*_: object) -> None:
    raise TimeoutError(f'it takes longer than {seconds:g} seconds')

  main = threading.current_thread() is threading.main_thread()
  if not main or signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL:
    yield
    return
  signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _shown(dialogue: Dialogue) -> str:
  roles = ', '.join(message.role for message in dialogue)
  return f'dialogue ({roles}) that begins with {dialogue[0].content!r:.60}'
