"""A server in a thread that answers as vLLM or SGLang would, sampling with the library.

It really loads what it is told to, with the library's loader of checkpoint folders, and it draws
with the keys of the seeds that a test has told it of: then its tokens are those that the engine of
this process samples.
"""

import collections
import contextlib
import dataclasses
import http.server
import json
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from rlhf_jax.common.types import Prompts
from rlhf_jax.generation.config import GenerationConfig
from rlhf_jax.generation.sample import generate
from rlhf_jax.models import decoder
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf_load import load_decoder, open_checkpoint
from rlhf_jax.rollout.http_engine import row_seeds

WIDTH = 8


class Hang(Exception):  # noqa: N818
  """The request is never answered."""


@dataclasses.dataclass
class StandIn:
  """What the server knows, does and has seen.

  Attributes:
    dialect: 'vllm' or 'sglang'.
    url: its root, once it runs.
    asked: paths and bodies, in order.
    loaded: folders of weights, in order.
    params: the decoder that was loaded last.
    troubles: statuses that are answered in the place of what is asked next, first to last, with
      their texts; a status of 0 never answers.
    spoil: changes an answer of sampling before it goes out.
  """

  dialect: str
  url: str = ''
  asked: list[tuple[str, Any]] = dataclasses.field(default_factory=list)
  loaded: list[pathlib.Path] = dataclasses.field(default_factory=list)
  params: Any = None
  troubles: collections.deque[tuple[int, str]] = dataclasses.field(
    default_factory=collections.deque
  )
  spoil: Callable[[Any], Any] = lambda answer: answer
  model: ModelConfig | None = None
  version: str = 'default'
  draws: dict[int, tuple[Any, int]] = dataclasses.field(default_factory=dict)
  over: threading.Event = dataclasses.field(default_factory=threading.Event)
  lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

  def know(self, key: Any, rows: int) -> None:
    """Tells it with which keys the rows of a round of sampling draw."""
    seeds = np.asarray(row_seeds(key, np.arange(rows)))
    self.draws |= {int(seed): (key, row) for row, seed in enumerate(seeds)}

  def answer(self, path: str, body: Any) -> tuple[int, str]:
    """The status and the text of what is asked."""
    with self.lock:
      self.asked.append((path, body))
      trouble = self.troubles.popleft() if self.troubles and path != '/health' else None
      if trouble is not None and trouble[0]:
        return trouble
      if trouble is None:
        return self._served(path, body)
    self.over.wait()
    raise Hang

  def _served(self, path: str, body: Any) -> tuple[int, str]:
    if path == '/health':
      return 200, ''
    if self.dialect == 'vllm' and path == '/collective_rpc':
      assert body['method'] == 'reload_weights'
      self._load(body['kwargs']['weights_path'])
      return 200, json.dumps({'results': [None]})
    if self.dialect == 'vllm' and path == '/reset_prefix_cache':
      return 200, ''
    if self.dialect == 'sglang' and path == '/update_weights_from_disk':
      self._load(body['model_path'])
      self.version = body['weight_version']
      return 200, json.dumps({'success': True, 'message': 'Succeeded to update model weights.'})
    if (self.dialect, path) == ('vllm', '/v1/completions'):
      return 200, json.dumps(self.spoil(self._completions(body)))
    if (self.dialect, path) == ('sglang', '/generate'):
      return 200, json.dumps(self.spoil(self._generated(body)))
    return 404, json.dumps({'detail': 'Not Found'})

  def _load(self, folder: str) -> None:
    checkpoint = open_checkpoint(folder)
    self.model = checkpoint.model
    abstract = jax.eval_shape(lambda: decoder.init(checkpoint.model, jax.random.key(0)))
    self.params = load_decoder(checkpoint, abstract)
    self.loaded.append(pathlib.Path(folder))

  def _completions(self, body: Any) -> Any:
    assert body['ignore_eos'] and body['return_token_ids'] and body['top_p'] == 1.0
    _, first = self.draws[body['seed']]
    key = self.draws[body['seed']][0]
    rows = [(body['prompt'], key, first + copy) for copy in range(body['n'])]
    settings = (body['temperature'], body['max_tokens'], tuple(body['stop_token_ids']))
    choices = [
      {
        'index': number,
        'text': 'not what is read',
        'finish_reason': reason,
        'token_ids': tokens,
        'logprobs': {'token_logprobs': logprobs},
      }
      for number, (tokens, logprobs, reason) in enumerate(self._sample(rows, *settings))
    ]
    return {'object': 'text_completion', 'choices': choices[::-1]}

  def _generated(self, body: Any) -> Any:
    settings = body['sampling_params']
    one = settings[0]
    assert one['ignore_eos'] == (not one['stop_token_ids']) and body['return_logprob']
    rows = [
      (prompt, *self.draws[own['sampling_seed']])
      for prompt, own in zip(body['input_ids'], settings, strict=True)
    ]
    stops = tuple(one['stop_token_ids'])
    found = self._sample(rows, one['temperature'], one['max_new_tokens'], stops)
    return [
      {
        'text': 'not what is read',
        'meta_info': {
          'finish_reason': {'type': reason},
          'output_token_logprobs': [[lp, t, None] for t, lp in zip(tokens, logprobs, strict=True)],
          'weight_version': self.version,
        },
      }
      for tokens, logprobs, reason in found
    ]

  def _sample(
    self, rows: list[Any], temperature: float, longest: int, stops: tuple[int, ...]
  ) -> list[tuple[list[int], list[float], str]]:
    assert self.model is not None, 'nothing was loaded'
    tokens = np.zeros((len(rows), WIDTH), np.int32)
    mask = np.zeros((len(rows), WIDTH), bool)
    for row, (prompt, _, _) in enumerate(rows):
      tokens[row, WIDTH - len(prompt) :] = prompt
      mask[row, WIDTH - len(prompt) :] = True
    prompts = Prompts(tokens, mask, np.array([row for _, _, row in rows], np.int32))
    config = GenerationConfig(temperature=temperature, stop_tokens=stops)
    drawn = jax.device_get(_draw(self.model, config, longest)(self.params, prompts, rows[0][1]))
    found = []
    for row in range(len(rows)):
      own = drawn.mask[row]
      reason = 'stop' if drawn.finished[row] else 'length'
      found.append((drawn.tokens[row][own].tolist(), drawn.logprobs[row][own].tolist(), reason))
    return found


_DRAWING: dict[Any, Any] = {}


def _draw(model: ModelConfig, config: GenerationConfig, longest: int) -> Any:
  """A jitted sampler; jit keeps its programs by the function's identity."""
  key = (repr(model), repr(config), longest)
  if key not in _DRAWING:
    _DRAWING[key] = jax.jit(
      lambda params, prompts, key: generate(
        model, params, prompts, key, config=config, max_new_tokens=longest, eos_id=-1, pad_id=0
      )
    )
  return _DRAWING[key]


@contextlib.contextmanager
def running(dialect: str) -> Iterator[StandIn]:
  """A server on a free port of this machine, until the end of the block."""
  state = StandIn(dialect)

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:  # noqa: N802
      size = int(self.headers['Content-Length'])
      self._answer(json.loads(self.rfile.read(size)))

    def do_GET(self) -> None:  # noqa: N802
      self._answer(None)

    def _answer(self, body: Any) -> None:
      with contextlib.suppress(Hang, OSError):
        status, text = state.answer(self.path, body)
        data = text.encode()
        self.send_response(status)
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
      """Silent."""

  class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
      """A client that has gone is no error; what is wrong here is."""
      if not isinstance(sys.exception(), OSError):
        super().handle_error(request, client_address)

  server = Server(('127.0.0.1', 0), Handler)
  state.url = f'http://127.0.0.1:{server.server_address[1]}'
  thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.05})
  thread.start()
  try:
    yield state
  finally:
    state.over.set()
    server.shutdown()
    server.server_close()
    thread.join()
