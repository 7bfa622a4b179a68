"""Sampling by a server of another program: weights go as a checkpoint folder, tokens come back."""

import math
import operator
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.common import prng
from rlhf_jax.common.errors import ServerError
from rlhf_jax.common.types import Prompts
from rlhf_jax.generation.samples import Samples, repeat_prompts, samples_to_sequences
from rlhf_jax.rollout.client import Client, Request
from rlhf_jax.rollout.config import ServerConfig
from rlhf_jax.rollout.dialects import DIALECTS, Completed, Wanted
from rlhf_jax.rollout.engine import Generated, Roles
from rlhf_jax.sharding.mesh import put_batch

Array = jax.Array


class Served(NamedTuple):
  """The policy that a server samples.

  Attributes:
    export: writes its parameters, by role, as a new checkpoint folder.
    vocab_size: token ids are below it.
    pad_id: fills what is not sampled.
    copies: responses to each prompt.
  """

  export: Callable[[pathlib.Path, Roles], None]
  vocab_size: int
  pad_id: int
  copies: int


@jax.jit
def row_seeds(key: Array, index: Array) -> Array:
  """`[B]` numbers of rows -> `[B]` seeds of 31 bits, functions of the keys that rows draw with."""
  return jax.vmap(lambda each: jax.random.bits(each) >> 1)(prng.row_keys(key, index))


class HttpEngine:
  """Samples on one server, for a process alone.

  Responses are checked before anything learns from them: they end as the engine of this process
  would end them, all of their tokens are of the vocabulary, and they are of the weights that were
  handed over last, where the server says so.
  """

  def __init__(
    self,
    config: ServerConfig,
    wanted: Wanted,
    served: Served,
    weights: pathlib.Path,
    mesh: jax.sharding.Mesh,
  ):
    """Finds that the server is there.

    Args:
      config: which server.
      wanted: how it samples.
      served: what it samples from.
      weights: the folder that the folders of weights lie in while they are needed.
      mesh: where responses go.

    Raises ServerError.
    """
    self._config, self._wanted, self._served = config, wanted, served
    self._weights, self._mesh = weights.absolute(), mesh
    self._dialect, self._client = DIALECTS[config.dialect], Client(config)
    self._version: str | None = None
    self._sent: list[Any] = []
    self._client.ask(Request('/health'))

  def sync_weights(self, params: Roles, step: int | Array) -> None:
    """Writes the weights, and has the server load them; not if it has these very arrays."""
    leaves = jax.tree.leaves(params)
    same = len(leaves) == len(self._sent) and all(map(operator.is_, leaves, self._sent))
    if self._version is not None and same:
      return
    folder = self._weights / f'{int(step):08}'
    version = str(folder)  # which no other run has
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    self._served.export(folder, params)
    for request in self._dialect.loading(str(folder), version):
      answer = self._client.ask(request)
      if not self._dialect.loaded(answer):
        raise ServerError(
          f'{self._config.url}{request.path}: the server did not load {folder}: {answer!r:.500}'
        )
    self._version, self._sent = version, leaves
    for other in self._weights.iterdir():
      if other != folder:
        shutil.rmtree(other, ignore_errors=True)

  def generate(self, prompts: Prompts, key: Array) -> Generated:
    """One request a prompt."""
    assert self._version is not None, 'sync_weights comes first'
    repeated = repeat_prompts(prompts, self._served.copies)
    seeds = np.asarray(row_seeds(key, repeated.index)).reshape(len(prompts.tokens), -1)
    requests = [
      self._dialect.question(self._wanted, tokens[mask].tolist(), own.tolist())
      for tokens, mask, own in zip(prompts.tokens, prompts.mask, seeds, strict=True)
    ]
    answers = self._client.ask_all(requests)
    rows: list[Completed] = []
    for request, answer in zip(requests, answers, strict=True):
      rows += self._read(request, answer)
    samples = self._samples(rows)
    sequences = samples_to_sequences(repeated, samples)
    logprobs = samples.logprobs if all(row.logprobs is not None for row in rows) else None
    return put_batch(Generated(sequences, samples.finished, logprobs), self._mesh)

  def close(self) -> None:
    """Gives up what is under way, and deletes the weights; the server keeps its own copy."""
    self._client.stop()
    self._sent = []
    shutil.rmtree(self._weights, ignore_errors=True)

  def _read(self, request: Request, answer: Any) -> list[Completed]:
    """The responses to one prompt; raises ServerError for any that cannot be learnt from."""
    where = f'{self._config.url}{request.path}'
    try:
      found = self._dialect.completions(answer)
      problems = [problem for one in found if (problem := self._problem(one))]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
      raise ServerError(
        f'{where}: not an answer of {self._config.dialect} (--config.rollout.server.dialect; '
        f'{type(error).__name__}: {error}): {answer!r:.500}'
      ) from error
    if len(found) != self._served.copies:
      problems.insert(0, f'{len(found)} responses in the place of {self._served.copies}')
    if problems:
      raise ServerError(f'{where}: {problems[0]}')
    return found

  def _problem(self, row: Completed) -> str:
    """What is wrong with a response; '' if nothing is."""
    wanted, size, tokens = self._wanted, self._served.vocab_size, row.tokens
    if row.reason not in ('stop', 'length'):
      return f'it ended a response for {row.reason!r}.'
    if row.version not in (None, self._version):
      return (
        f'a response of the weights {row.version!r}, not of {self._version!r}, which were handed '
        'over. Has the server started anew, or does another run use it?'
      )
    if not 1 <= len(tokens) <= wanted.longest:
      return f'a response of {len(tokens)} tokens: expected 1 to {wanted.longest}.'
    if not all(type(token) is int and 0 <= token < size for token in tokens):
      outside = next(token for token in tokens if type(token) is not int or not 0 <= token < size)
      return (
        f'token {outside!r} is none of the {size} of the vocabulary. Is it another model than '
        'the one that is trained?'
      )
    if any(token in wanted.stops for token in tokens[:-1]):
      return f'a response that goes on after a stop token (of {wanted.stops}).'
    if len(tokens) < wanted.longest and tokens[-1] not in wanted.stops:
      return (
        f'a response that ends after {len(tokens)} of {wanted.longest} tokens, with {tokens[-1]}, '
        f'which is no stop token {wanted.stops}. Is there room for prompt and response on the '
        'server, or has its generation config another end?'
      )
    if row.logprobs is not None and not (
      len(row.logprobs) == len(tokens) and all(map(math.isfinite, row.logprobs))
    ):
      return f'log-probs {row.logprobs!r:.200} of {len(tokens)} tokens: expected as many numbers.'
    return ''

  def _samples(self, rows: Sequence[Completed]) -> Samples:
    """Rows of different lengths as arrays on the host."""
    shape = (len(rows), self._wanted.longest)
    lengths = np.array([len(row.tokens) for row in rows])
    mask = np.arange(shape[1]) < lengths[:, None]
    tokens = np.full(shape, self._served.pad_id, np.int32)
    logprobs = np.zeros(shape, np.float32)
    tokens[mask] = [token for row in rows for token in row.tokens]
    if all(row.logprobs is not None for row in rows):
      logprobs[mask] = [each for row in rows for each in row.logprobs or ()]
    finished = np.array([row.tokens[-1] in self._wanted.stops for row in rows])
    arrays: Any = (tokens, mask, logprobs, finished)
    return Samples(*arrays)
