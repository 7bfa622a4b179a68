"""How responses of a rollout are sampled, and how they are scored."""

import dataclasses
import urllib.parse

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.generation.config import GenerationConfig
from rlhf_jax.models.hf_files import DTYPES
from rlhf_jax.objectives.base import check_unread

ENGINES = ('local', 'http')
DIALECTS = ('vllm', 'sglang')


@dataclasses.dataclass(kw_only=True)
class RewardConfig:
  """One of the rewards that make up a response's score."""

  # 'reward_model' (the config's reward_model), 'task' (the embedded task's gold reward), or a
  # Python function, 'FILE.py:NAME': (prompts, responses) -> numbers, one a response. It judges
  # each by itself: of several processes, every one calls it with a part of a batch.
  source: str = 'reward_model'
  # 'reward_model' only: another one than the config's, a run or a config, e.g. for safety beside
  # helpfulness; None: the config's.
  init: str | None = None
  # Functions only: further files that it reads, lexicons or modules; with other content the stage
  # is another one.
  files: tuple[str, ...] = ()
  # Its weight in the sum.
  weight: float = 1.0
  # Above this it counts no more (a threshold on what is good enough; Moskovitz et al. 2023). None:
  # no limit.
  clip_above: float | None = None
  # Where this reward is below the gate, it alone is the score, weighted. None: no gate.
  gate_below: float | None = None
  # Leave it out of the sum where it is above the gate (Touvron et al. 2023, Llama 2, section 3.2.3:
  # safety below its gate, helpfulness alone above).
  gate_only: bool = False

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    file, colon, name = self.source.rpartition(':')
    if self.source not in ('reward_model', 'task') and not (
      colon and file.endswith('.py') and name.isidentifier()
    ):
      raise ConfigError(
        f'{path}.source', self.source, "'reward_model', 'task' or a function, 'FILE.py:NAME'"
      )
    if self.init is not None and self.source != 'reward_model':
      raise ConfigError(f'{path}.init', self.init, f'None with source {self.source!r}')
    if self.files and self.source in ('reward_model', 'task'):
      raise ConfigError(f'{path}.files', self.files, f'none with source {self.source!r}')
    if self.gate_only and self.gate_below is None:
      raise ConfigError(f'{path}.gate_only', True, f'False without {path}.gate_below')
    limit, gate = self.clip_above, self.gate_below
    if limit is not None and gate is not None and limit < gate:
      raise ConfigError(
        f'{path}.clip_above',
        limit,
        f'None, or a number >= {path}.gate_below={gate}',
        'It would count for no more above the gate than just below it.',
      )
    if self.weight == 0:
      raise ConfigError(f'{path}.weight', self.weight, 'a number that is not 0', 'Leave it out.')


@dataclasses.dataclass(kw_only=True)
class ServerConfig:
  """A server of another program that samples; with engine 'http' only (docs/rollouts.md).

  Where it is does not change what a run is: it may go on with another one.
  """

  # The server's root, 'http://HOST:PORT'.
  url: str | None = None
  # Which program it is: 'vllm' or 'sglang'.
  dialect: str = 'vllm'
  # Under which name it has the model; None: it has only one.
  model: str | None = None
  # Seconds without an answer after which a request is given up.
  timeout: float = 600.0
  # How often a request is tried again where that may help, and seconds before the first such try,
  # twice as many before each further one, at most 60.
  retries: int = 5
  backoff: float = 1.0
  # Requests at a time, one a prompt.
  concurrency: int = 256
  # Where weights lie until the server has read them, under the same path on its machine; None:
  # weights/ in the run directory.
  weights: str | None = None
  # The numbers they are handed over in: 'float32', 'bfloat16' or 'float16'.
  dtype: str = 'bfloat16'

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if self.url is not None and not _is_root(self.url):
      raise ConfigError(
        f'{path}.url', self.url, "the server's root, 'http://HOST:PORT', without /v1"
      )
    if self.dialect not in DIALECTS:
      raise ConfigError(f'{path}.dialect', self.dialect, f'one of {DIALECTS}')
    if self.dialect == 'sglang' and self.model is not None:
      raise ConfigError(f'{path}.model', self.model, "None with dialect 'sglang', which has one")
    if not self.timeout > 0:
      raise ConfigError(f'{path}.timeout', self.timeout, 'seconds, above 0')
    if not self.backoff >= 0:
      raise ConfigError(f'{path}.backoff', self.backoff, 'seconds, 0 or above')
    if self.retries < 0:
      raise ConfigError(f'{path}.retries', self.retries, 'an integer >= 0')
    if self.concurrency < 1:
      raise ConfigError(f'{path}.concurrency', self.concurrency, 'an integer >= 1')
    dtypes = tuple(DTYPES.values())
    if self.dtype not in dtypes:
      raise ConfigError(f'{path}.dtype', self.dtype, f'one of {dtypes}')


def _is_root(url: str) -> bool:
  """Whether a text is the URL that others are below."""
  try:
    parts = urllib.parse.urlsplit(url)
    known = parts.port is None or parts.port > 0
  except ValueError:
    return False
  bare = not (parts.query or parts.fragment or parts.username)
  last = parts.path.rstrip('/').rpartition('/')[2]
  return (
    known and bare and parts.scheme in ('http', 'https') and bool(parts.hostname) and (last != 'v1')
  )


@dataclasses.dataclass(kw_only=True)
class RolloutConfig:
  """Who samples responses, and what is paid for them.

  It is read by objectives that learn from their own samples.
  """

  # What a response is paid: a weighted sum of rewards, with gates.
  rewards: tuple[RewardConfig, ...] = dataclasses.field(default_factory=lambda: (RewardConfig(),))
  # Responses that never stopped: 'none' leaves their score, 'replace' puts missing_stop_value in
  # its place (-1 in Huang et al. 2024), 'subtract' takes missing_stop_value off (TRL: 1).
  missing_stop: str = 'none'
  missing_stop_value: float = -1.0
  # Scoring only: cut the response after the first such token at or after the given position; the
  # policy trains on the uncut response, and one without it counts as never stopped (Ziegler et al.
  # 2019: token 13 after position 16). -1 is off.
  score_truncation_token: int = -1
  score_truncation_after: int = 0
  # Also measure the exact per-token KL from full logits (costs one `[B, R, V]` array twice).
  exact_kl: bool = False
  # Whose log-probs updates compare the policy's with: those of the 'trainer', which reads each
  # response again; or, to save that pass, of the 'sampler' itself. They differ by rounding, which
  # the metric sampler_logprob_error shows of the former, and first_ratio_deviation of the latter.
  old_logprobs: str = 'trainer'
  # Who samples: 'local', this program, on the mesh that trains; or 'http', a server to which the
  # weights are handed over before each iteration. Evaluations are always sampled here.
  engine: str = 'local'
  # 'local' only: for how many lengths of prompts, data.prompt_length, half of it, a quarter, there
  # is a program that samples. A batch of short prompts takes the smallest that holds it; what is
  # sampled is the same. Each is compiled when it is first needed.
  prompt_buckets: int = 1
  # 'local' only: how many devices share the heads, hidden units and vocabulary of a copy of the
  # weights while responses are sampled; each such group samples rows of its own. The weights are
  # laid out anew in each iteration, which takes the memory of a copy. 0: on the mesh that trains.
  sampling_tensor: int = 0
  # 'http' only: the server.
  server: ServerConfig = dataclasses.field(default_factory=ServerConfig)

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if not self.rewards:
      raise ConfigError(f'{path}.rewards', self.rewards, 'at least one reward')
    for number, reward in enumerate(self.rewards):
      reward.validate(f'{path}.rewards[{number}]')
      if (reward.source, reward.init) in [(r.source, r.init) for r in self.rewards[:number]]:
        raise ConfigError(
          f'{path}.rewards[{number}].source',
          reward.source,
          'another one than those before it',
          'The same twice is twice its weight.',
        )
    if all(reward.gate_only for reward in self.rewards):
      raise ConfigError(f'{path}.rewards', '...', 'at least one that is not gate_only')
    if self.score_truncation_after < 0:
      raise ConfigError(
        f'{path}.score_truncation_after', self.score_truncation_after, 'an integer >= 0'
      )
    if self.score_truncation_token < 0:
      check_unread(self, path, ('score_truncation_after',), 'without score_truncation_token')
    self._validate_engine(path)
    kinds = ('none', 'replace', 'subtract')
    if self.missing_stop not in kinds:
      raise ConfigError(f'{path}.missing_stop', self.missing_stop, f'one of {kinds}')
    if self.missing_stop == 'none':
      check_unread(self, path, ('missing_stop_value',), "with missing_stop 'none'")
    if self.missing_stop == 'subtract' and self.missing_stop_value <= 0:
      raise ConfigError(
        f'{path}.missing_stop_value',
        self.missing_stop_value,
        "a number > 0 with missing_stop 'subtract'",
        'Taking a negative number off would reward responses that never stop.',
      )

  def _validate_engine(self, path: str) -> None:
    if self.engine not in ENGINES:
      raise ConfigError(f'{path}.engine', self.engine, f'one of {ENGINES}')
    if self.prompt_buckets < 1:
      raise ConfigError(f'{path}.prompt_buckets', self.prompt_buckets, 'an integer >= 1')
    if self.sampling_tensor < 0:
      raise ConfigError(
        f'{path}.sampling_tensor', self.sampling_tensor, 'a number of devices, or 0 for the mesh'
      )
    self.server.validate(f'{path}.server')
    self._validate_old_logprobs(path)
    if self.engine == 'local':
      for field in dataclasses.fields(self.server):
        value = getattr(self.server, field.name)
        if value != field.default:
          raise ConfigError(
            f'{path}.server.{field.name}',
            value,
            f"{field.default!r} with {path}.engine='local', which does not read it",
            f"{path}.engine='http' samples on a server.",
          )
      return
    if self.server.url is None:
      raise ConfigError(f'{path}.server.url', None, f"a URL with {path}.engine='http'")
    if self.prompt_buckets > 1:
      raise ConfigError(
        f'{path}.prompt_buckets',
        self.prompt_buckets,
        f"1 with {path}.engine='http'",
        'The server is given prompts without padding.',
      )
    if self.sampling_tensor:
      raise ConfigError(
        f'{path}.sampling_tensor', self.sampling_tensor, f"0 with {path}.engine='http'"
      )

  def _validate_old_logprobs(self, path: str) -> None:
    field, kinds = f'{path}.old_logprobs', ('trainer', 'sampler')
    if self.old_logprobs not in kinds:
      raise ConfigError(field, self.old_logprobs, f'one of {kinds}')
    if self.old_logprobs == 'sampler' and self.engine != 'local':
      raise ConfigError(
        field,
        self.old_logprobs,
        f"'trainer' with {path}.engine={self.engine!r}",
        'A server computes in other numbers than the trainer.',
      )

  def check_sampling(self, path: str, generation: GenerationConfig, dtype: str | None) -> None:
    """Raises ConfigError where responses are sampled in a way that does not go with the rollout.

    `dtype` is the type that the trainer computes in; None: that of a start that is not known yet.
    """
    own = generation.dtype
    if self.old_logprobs == 'sampler' and None not in (own, dtype) and own != dtype:
      raise ConfigError(
        f'{path}.old_logprobs',
        self.old_logprobs,
        f"'trainer' with generation.dtype={own!r} and model.dtype={dtype!r}",
        'The sampler computes in other numbers than the trainer.',
      )
    sglang = self.engine == 'http' and self.server.dialect == 'sglang'
    if sglang and generation.stop_tokens and not generation.stop_at_eos:
      raise ConfigError(
        'generation.stop_at_eos',
        False,
        f"True with stop_tokens and {path}.server.dialect='sglang'",
        'SGLang ends responses at its end of sequence too, unless there are no stop tokens.',
      )

  def sources(self) -> tuple[str, ...]:
    """Where the rewards come from."""
    return tuple(reward.source for reward in self.rewards)
