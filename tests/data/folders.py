"""Tiny tokenizer folders of the kinds that Hugging Face checkpoints bring."""

import json
import pathlib
from typing import Any

import tokenizers as hf

from rlhf_jax.feedback.dialogues import Dialogue, Message

TEXTS = [
  'Hello there, how are you?',
  'I am fine. And you?',
  'Be brief.',
  'naïve ☺ 漢字 twice twice',
]
_OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
# Qwen 2.5's and many others', without and with the keyword that marks what the assistant says.
CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
  '{% endfor %}' + _OPEN
)
MARKED_CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
  "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
  "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}" + _OPEN
)
# Llama 2's: writes both special tokens itself, and refuses roles that do not alternate.
LLAMA = (
  "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
  "{% if m.role == 'user' %}{{ '[INST] ' + m.content | trim + ' [/INST]' }}"
  "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Qwen 3's way: of answers before the last question, the thoughts are left out.
FORGETFUL = (
  '{% for m in messages %}{% set last = loop.last %}'
  "{{ '<|im_start|>' + m.role + '\\n' + (m.content if last else m.content.split('</t>')[-1]) }}"
  "{{ '<|im_end|>\\n' }}{% endfor %}" + _OPEN
)


def dialogue(*said: str) -> Dialogue:
  """'u:Hi' -> a message of the user."""
  roles = {'s': 'system', 'u': 'user', 'a': 'assistant', 't': 'tool'}
  return tuple(Message(roles[text[0]], text[2:]) for text in said)


def save(backend: hf.Tokenizer, folder: pathlib.Path, **settings: Any) -> Any:
  """Saves it as Hugging Face's tools do; returns their tokenizer, the reference of tests."""
  import transformers

  theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
  theirs.save_pretrained(str(folder))
  return theirs


def gpt2(folder: pathlib.Path, template: str | None = CHATML, **settings: Any) -> Any:
  """Byte-level BPE without padding; one token begins and ends texts, two more mark up chats."""
  backend = hf.Tokenizer(hf.models.BPE())
  backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = hf.decoders.ByteLevel()
  backend.post_processor = hf.processors.ByteLevel(trim_offsets=True)
  trainer = hf.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>'],
    initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  backend.train_from_iterator(TEXTS, trainer)
  end = {'bos_token': '<|endoftext|>', 'eos_token': '<|endoftext|>'}
  return save(backend, folder, chat_template=template, **{**end, **settings})


def llama(folder: pathlib.Path, template: str | None = LLAMA, **settings: Any) -> Any:
  """BPE over pieces that begin with a space mark; its own encoding puts `<s>` in front."""
  backend = hf.Tokenizer(hf.models.BPE(unk_token='<unk>', byte_fallback=True))
  backend.normalizer = hf.normalizers.Sequence(
    [hf.normalizers.Prepend('▁'), hf.normalizers.Replace(' ', '▁')]
  )
  backend.decoder = hf.decoders.Sequence(
    [
      hf.decoders.Replace('▁', ' '),
      hf.decoders.ByteFallback(),
      hf.decoders.Fuse(),
      hf.decoders.Strip(' ', 1, 0),
    ]
  )
  trainer = hf.trainers.BpeTrainer(
    vocab_size=380,
    special_tokens=['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256))],
    initial_alphabet=list('[]/INSTabc'),
    show_progress=False,
  )
  backend.train_from_iterator(TEXTS, trainer)
  backend.post_processor = hf.processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', 1)]
  )
  names = {'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>'}
  return save(backend, folder, chat_template=template, **{**names, **settings})


def word_piece(folder: pathlib.Path) -> Any:
  """BERT's kind: it has no end of sequence."""
  backend = hf.Tokenizer(hf.models.WordPiece({'[UNK]': 0, '[PAD]': 1, 'hi': 2}, unk_token='[UNK]'))
  backend.pre_tokenizer = hf.pre_tokenizers.Whitespace()
  return save(backend, folder, unk_token='[UNK]', pad_token='[PAD]')


def write(folder: pathlib.Path, file: str, values: Any) -> None:
  """Writes a JSON file."""
  (folder / file).write_text(json.dumps(values))


def change(folder: pathlib.Path, file: str, **values: Any) -> None:
  """Sets entries of a JSON file; those that are None are taken out."""
  found = {**json.loads((folder / file).read_text()), **values}
  write(folder, file, {name: value for name, value in found.items() if value is not None})
