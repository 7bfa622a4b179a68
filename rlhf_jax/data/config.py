"""What data a stage learns from, and how text becomes tokens."""

import dataclasses
import math

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.prng import check_seed
from rlhf_jax.data.lqr import LQRConfig
from rlhf_jax.feedback.convert import CONVERTERS
from rlhf_jax.feedback.labelling import LabelConfig

TRUNCATIONS = ('drop_turns', 'keep_end', 'keep_start')
RESPONSES = ('chosen', 'preferred', 'all')
ON_ERROR = ('strict', 'quarantine')
TRAINED_TOKENIZERS = ('word', 'byte')
EMBEDDED = 'embedded:reviews'
CONTROL = 'embedded:lqr'
# The special tokens and, for bytes, one token each: no vocabulary can be smaller.
SMALLEST_VOCABULARY = {'word': 5, 'byte': 260}
# The responses of a ranking all differ, and of responses of one word there are few dozens.
LARGEST_RANKING = 32


@dataclasses.dataclass(kw_only=True)
class ReviewsConfig:
  """How much feedback the embedded task makes, and how it is labelled; 'embedded:reviews' only."""

  # Records to learn from of each kind; the held-out ones (data.held_out) come on top.
  demonstrations: int = 6000
  comparisons: int = 16000
  prompts: int = 4096
  # These three are made when they are first read.
  ratings: int = 16000
  rankings: int = 8000
  step_ratings: int = 4000
  labels: LabelConfig = dataclasses.field(default_factory=LabelConfig)
  # Standard deviation of what annotators add to the gold reward in a rating, in nats. At 0.6 two
  # ratings order a pair about as reliably as a comparison at labels.temperature 0.5 does:
  # sigmoid(x / 0.5) is about Phi(x / (1.7 * 0.5)), and sqrt(2) * 0.6 is 1.7 * 0.5.
  rating_noise: float = 0.6
  # Responses in a ranking; 4 as in the choices of Ziegler et al. 2019 (section 2.1).
  ranking_size: int = 4
  # Seeds the texts and the labels: equal seeds give equal feedback, whatever the run's seed.
  seed: int = 0

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    for name in (
      'demonstrations',
      'comparisons',
      'prompts',
      'ratings',
      'rankings',
      'step_ratings',
    ):
      if getattr(self, name) < 1:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'an integer >= 1')
    if not 0 <= self.rating_noise < math.inf:
      raise ConfigError(f'{path}.rating_noise', self.rating_noise, 'a number >= 0')
    if not 2 <= self.ranking_size <= LARGEST_RANKING:
      raise ConfigError(
        f'{path}.ranking_size', self.ranking_size, f'an integer in [2, {LARGEST_RANKING}]'
      )
    check_seed(f'{path}.seed', self.seed)
    self.labels.validate(f'{path}.labels')


@dataclasses.dataclass(kw_only=True)
class TFDSConfig:
  """Which fields and splits of a tensorflow-datasets builder to read; 'tfds:NAME' only."""

  # The split to learn from, in the slicing language of tfds, e.g. 'train[:90%]'.
  split: str = 'train'
  # The split kept for evaluation; None: data.held_out of the records of `split`.
  held_out_split: str | None = None
  # The text field that holds prompts; None: every prompt is empty.
  prompt_field: str | None = None
  # The text field that holds responses; None: the records are prompts only.
  response_field: str | None = 'text'

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if not self.split:
      raise ConfigError(f'{path}.split', self.split, "a split, such as 'train'")
    if self.prompt_field is None and self.response_field is None:
      raise ConfigError(
        f'{path}.response_field',
        None,
        'a text field here or in prompt_field',
        'Without either there is nothing to read.',
      )


@dataclasses.dataclass(kw_only=True)
class DataConfig:
  """A source of feedback, and the shape of its batches."""

  # 'embedded:reviews' (a task with a known optimum), 'embedded:lqr' (control with a known optimum),
  # 'jsonl' (a file) or 'tfds:NAME'.
  source: str = EMBEDDED
  # The file of 'jsonl', plain or .gz; the data_dir of 'tfds:NAME' (None: the tfds default).
  path: str | None = None
  # A second 'jsonl' file kept for evaluation; None: data.held_out of the records of `path`.
  held_out_path: str | None = None
  # Records kept for evaluation: a fraction below 1, else a count. Records of one prompt stay on one
  # side.
  held_out: float = 0.1
  # 'strict': a bad record is an error; 'quarantine': it goes to a side file with the reason.
  on_error: str = 'strict'
  # What supervised stages imitate: the demonstrations (the chosen responses where the source has
  # none); 'preferred', the chosen responses of comparisons alone (the Preferred-FT baseline of
  # Rafailov et al. 2023, section 6); or 'all', the demonstrations and both responses of every
  # comparison (CPL's behaviour cloning).
  responses: str = 'chosen'
  # A converter (docs/data.md) whose records replace those of their kind, e.g.
  # 'ratings_to_comparisons', so that DPO can learn from ratings; '': the feedback as it is.
  convert: str = ''
  # Tokens of a prompt, the first of them <bos>; shorter ones are padded on the left.
  prompt_length: int = 5
  # Tokens of a response, <eos> included; shorter ones are padded on the right, longer ones are cut
  # and have no <eos>.
  response_length: int = 16
  # Whether the responses of a comparison or a ranking, and the samples of a prompt, are read after
  # one copy of it: the same numbers for less work, to float error. False: each after a copy of its
  # own.
  share_prompts: bool = True
  # How many widths prompts have, and responses: a batch is as wide as the least that hold its rows,
  # of so many equal steps up to prompt_length and response_length. The same losses for less work;
  # every pair of widths that occurs is compiled. For objectives that learn from given responses.
  length_buckets: int = 1
  # Over how many batches rows are put together by their width, so that short ones do not wait for
  # long ones; 1: batches are drawn from all rows. Read with length_buckets.
  length_window: int = 1
  # Whether several demonstrations are read in one row where they fit, none seeing another. The same
  # losses for less work.
  pack: bool = False
  # What is kept of a longer prompt: 'drop_turns' leaves whole turns of a dialogue out, the oldest
  # first, never the system message or the last question, and keeps the end of what is still too
  # long and of texts; 'keep_end' (Rafailov et al. 2023's code) and 'keep_start' count tokens alone.
  truncation: str = 'drop_turns'
  # 'word' (split at white space) or 'byte' (byte-level BPE), trained on the training records;
  # else a folder with a tokenizer of ours or of Hugging Face's.
  tokenizer: str = 'word'
  # How dialogues are written: '' as the tokenizer's folder says; 'plain' (Human: and Assistant:),
  # for tokenizers that have no template; else a file with a jinja template.
  chat_template: str = ''
  # The most tokens a trained tokenizer may have.
  vocab_size: int = 8192
  reviews: ReviewsConfig = dataclasses.field(default_factory=ReviewsConfig)
  lqr: LQRConfig = dataclasses.field(default_factory=LQRConfig)
  tfds: TFDSConfig = dataclasses.field(default_factory=TFDSConfig)

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    self._validate_source(path)
    for name, kinds in (
      ('on_error', ON_ERROR),
      ('responses', RESPONSES),
      ('truncation', TRUNCATIONS),
    ):
      if getattr(self, name) not in kinds:
        raise ConfigError(f'{path}.{name}', getattr(self, name), f'one of {kinds}')
    if self.convert and self.convert not in CONVERTERS:
      raise ConfigError(f'{path}.convert', self.convert, f"'' or one of {', '.join(CONVERTERS)}")
    if not (0 <= self.held_out < 1 or float(self.held_out).is_integer() and self.held_out >= 1):
      raise ConfigError(f'{path}.held_out', self.held_out, 'a fraction in [0, 1) or a whole count')
    if self.prompt_length < 2:
      raise ConfigError(
        f'{path}.prompt_length', self.prompt_length, 'an integer >= 2', '<bos> takes one.'
      )
    if self.response_length < 1:
      raise ConfigError(f'{path}.response_length', self.response_length, 'an integer >= 1')
    for name in ('length_buckets', 'length_window'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'an integer >= 1')
    if self.length_window > 1 and self.length_buckets == 1:
      raise ConfigError(
        f'{path}.length_window',
        self.length_window,
        f'1 with {path}.length_buckets=1: all batches are equally wide',
      )
    if not self.tokenizer:
      raise ConfigError(f'{path}.tokenizer', self.tokenizer, "'word', 'byte' or a folder")
    smallest = SMALLEST_VOCABULARY.get(self.tokenizer, 0)
    if self.vocab_size < smallest:
      raise ConfigError(f'{path}.vocab_size', self.vocab_size, f'an integer >= {smallest}')
    self.reviews.validate(f'{path}.reviews')
    self.lqr.validate(f'{path}.lqr')
    self.tfds.validate(f'{path}.tfds')

  def _validate_source(self, path: str) -> None:
    kind, _, name = self.source.partition(':')
    if self.source not in (EMBEDDED, CONTROL, 'jsonl') and not (kind == 'tfds' and name):
      raise ConfigError(
        f'{path}.source', self.source, f"'{EMBEDDED}', '{CONTROL}', 'jsonl' or 'tfds:NAME'"
      )
    if self.source == 'jsonl' and self.path is None:
      raise ConfigError(f'{path}.path', None, 'a file', f'Give it: --config.{path}.path=FILE.')
    if self.source in (EMBEDDED, CONTROL) and self.path is not None:
      raise ConfigError(
        f'{path}.path',
        self.path,
        f'none with source {self.source!r}, which makes its own records',
        f"To read the file, set --config.{path}.source='jsonl'.",
      )
    if self.source != 'jsonl' and self.held_out_path is not None:
      raise ConfigError(
        f'{path}.held_out_path', self.held_out_path, f'none with source {self.source!r}'
      )
    if self.source in (EMBEDDED, CONTROL) and self.chat_template:
      raise ConfigError(
        f'{path}.chat_template',
        self.chat_template,
        f"'' with source {self.source!r}",
        'It has no dialogues.',
      )
    if self.source == CONTROL and self.convert:
      raise ConfigError(f'{path}.convert', self.convert, f"'' with source {CONTROL!r}")
    if self.source == EMBEDDED and self.tokenizer != 'word':
      raise ConfigError(
        f'{path}.tokenizer',
        self.tokenizer,
        f"'word' with source {EMBEDDED!r}",
        'Its responses are cut at whole words, which then must be tokens.',
      )
