"""What vLLM and SGLang are asked, and how their answers are read.

Token ids go out and come back as such; texts are never read. What a server would take from its
generation config is stated in every request, or it would sample from another distribution.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from rlhf_jax.rollout.client import Request


class Wanted(NamedTuple):
  """What holds of all responses.

  Attributes:
    temperature: of sampling; there are no filters.
    longest: R, tokens of the longest response.
    stops: ids that end a response.
    model: the name of the model on the server; None: the only one.
  """

  temperature: float
  longest: int
  stops: tuple[int, ...]
  model: str | None


class Completed(NamedTuple):
  """A response as the server gives it.

  Attributes:
    tokens: its ids, the stop token included.
    logprobs: theirs, as many; None: it does not say.
    reason: why it ended: 'stop', 'length', or something that went wrong.
    version: of the weights that sampled it; None: it does not say.
  """

  tokens: list[int]
  logprobs: list[float] | None
  reason: str
  version: str | None


class Dialect(Protocol):
  """How one kind of server is spoken to."""

  def question(self, wanted: Wanted, prompt: Sequence[int], seeds: Sequence[int]) -> Request:
    """Asks for a response to each seed."""

  def completions(self, answer: Any) -> list[Completed]:
    """Reads the answer; raises KeyError, TypeError, ValueError or IndexError if it is none."""

  def loading(self, folder: str, version: str) -> list[Request]:
    """Asks for the weights of a folder, and for nothing to be kept of those before them."""

  def loaded(self, answer: Any) -> bool:
    """Whether an answer to `loading` says that it was done."""


class VLLM:
  """vLLM's OpenAI-compatible completions, and the calls of its development mode.

  vllm/entrypoints/openai/completion/protocol.py, vllm/entrypoints/serve/dev/. Copy k of a prompt is
  drawn with the seed of the request plus k (vllm/v1/engine/parallel_sampling.py).
  """

  def question(self, wanted: Wanted, prompt: Sequence[int], seeds: Sequence[int]) -> Request:
    """One request for all copies, which share what was computed of the prompt."""
    body: dict[str, Any] = {
      'prompt': list(prompt),
      'n': len(seeds),
      'seed': seeds[0],
      'max_tokens': wanted.longest,
      'temperature': wanted.temperature,
      'top_p': 1.0,
      'top_k': 0,
      'min_p': 0.0,
      'repetition_penalty': 1.0,
      'presence_penalty': 0.0,
      'frequency_penalty': 0.0,
      # It then stops where we say, and nowhere else.
      'ignore_eos': True,
      'stop_token_ids': list(wanted.stops),
      'logprobs': 1,
      'return_token_ids': True,
    }
    if wanted.model is not None:
      body['model'] = wanted.model
    return Request('/v1/completions', body)

  def completions(self, answer: Any) -> list[Completed]:
    """In the order of the copies."""
    choices = sorted(answer['choices'], key=lambda choice: choice['index'])
    return [self._completed(choice) for choice in choices]

  def _completed(self, choice: Any) -> Completed:
    told = choice.get('logprobs')
    logprobs = None if told is None else told['token_logprobs']
    return Completed(choice['token_ids'], logprobs, str(choice['finish_reason']), None)

  def loading(self, folder: str, version: str) -> list[Request]:
    """What was computed of prompts by other weights is forgotten."""
    del version
    reload = {'method': 'reload_weights', 'kwargs': {'weights_path': folder}}
    return [Request('/collective_rpc', reload), Request('/reset_prefix_cache', {})]

  def loaded(self, answer: Any) -> bool:
    """It answers with an error where it fails."""
    return True


class SGLang:
  """SGLang's native interface.

  python/sglang/srt/managers/io_struct.py, python/sglang/srt/sampling/sampling_params.py. Seeds
  count on servers started with --enable-deterministic-inference.
  """

  def question(self, wanted: Wanted, prompt: Sequence[int], seeds: Sequence[int]) -> Request:
    """A batch of the copies, each with a seed of its own: `n` would draw them all from one."""
    common = {
      'max_new_tokens': wanted.longest,
      'temperature': wanted.temperature,
      'top_p': 1.0,
      'top_k': -1,
      'min_p': 0.0,
      'repetition_penalty': 1.0,
      'presence_penalty': 0.0,
      'frequency_penalty': 0.0,
      # It ignores stop_token_ids with the end of sequence.
      'ignore_eos': not wanted.stops,
      'stop_token_ids': list(wanted.stops),
    }
    body = {
      'input_ids': [list(prompt)] * len(seeds),
      'sampling_params': [{**common, 'sampling_seed': seed} for seed in seeds],
      'return_logprob': True,
    }
    return Request('/generate', body)

  def completions(self, answer: Any) -> list[Completed]:
    """Log-probs come as (log-prob, token, text)."""
    return [self._completed(row['meta_info']) for row in answer]

  def _completed(self, about: Any) -> Completed:
    drawn = about['output_token_logprobs']
    return Completed(
      tokens=[token for _, token, *_ in drawn],
      logprobs=[logprob for logprob, *_ in drawn],
      reason=str(about['finish_reason']['type']),
      version=about.get('weight_version'),
    )

  def loading(self, folder: str, version: str) -> list[Request]:
    """It forgets what other weights have computed by itself."""
    body = {'model_path': folder, 'weight_version': version, 'flush_cache': True}
    return [Request('/update_weights_from_disk', body)]

  def loaded(self, answer: Any) -> bool:
    """It says so."""
    return isinstance(answer, dict) and answer.get('success') is True


DIALECTS: dict[str, Dialect] = {'vllm': VLLM(), 'sglang': SGLang()}
