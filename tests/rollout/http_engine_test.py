"""A server samples as this process does, with the weights it was given; what it may get wrong."""

import concurrent.futures
import functools
import http.client
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from rlhf_jax.common import prng
from rlhf_jax.common.errors import ServerError
from rlhf_jax.common.types import Prompts
from rlhf_jax.data import tokenizers
from rlhf_jax.generation.config import GenerationConfig
from rlhf_jax.generation.sample import generate
from rlhf_jax.models import decoder, hf_export
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.rollout import dialects
from rlhf_jax.rollout.client import Client, Request
from rlhf_jax.rollout.config import DIALECTS, ServerConfig
from rlhf_jax.rollout.dialects import Wanted
from rlhf_jax.rollout.engine import Generated
from rlhf_jax.rollout.http_engine import HttpEngine, Served
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh
from tests.rollout import stand_in
from tests.rollout.stand_in import StandIn

R, COPIES, EOS, PAD = 6, 2, 2, 0
MODEL = ModelConfig(vocab_size=20, width=16, layers=2, heads=2, mlp_width=32, vocab_multiple=8)
STOPS = (EOS, 5)
KEY = prng.base_key(11)
TOKENS = np.array([[0, 0, 1, 3], [0, 1, 7, 4], [0, 0, 0, 1]], np.int32)
LENGTHS = np.array([2, 3, 1])
PROMPTS = Prompts(
  TOKENS, np.arange(4) >= 4 - LENGTHS[:, None], np.arange(len(TOKENS), dtype=np.int32)
)


@functools.cache
def params_of(seed: int) -> Any:
  return {'policy': decoder.init(MODEL, jax.random.key(seed))}


def sampled_here(params: Any) -> Any:
  """What the engine of this process draws."""
  config = GenerationConfig(temperature=0.7, stop_tokens=STOPS)
  return jax.device_get(
    jax.jit(
      lambda params, prompts: generate(
        MODEL,
        params['policy'],
        prompts,
        KEY,
        config=config,
        max_new_tokens=R,
        eos_id=-1,
        pad_id=PAD,
        samples=COPIES,
      )
    )(params, PROMPTS)
  )


class Both(NamedTuple):
  """A server and the engine that speaks to it."""

  server: StandIn
  engine: HttpEngine

  def generate(self) -> Generated:
    return jax.device_get(self.engine.generate(PROMPTS, KEY))


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('tokenizer')
  tokenizers.train('word', ['a b c d e f g h i j k l m n o p'], MODEL.vocab_size).save(folder)
  return folder


def make_engine(
  server: StandIn, tokenizer: pathlib.Path, weights: pathlib.Path, **settings: Any
) -> HttpEngine:
  config = ServerConfig(
    **{'url': server.url, 'dialect': server.dialect, 'dtype': 'float32', 'backoff': 0.0, **settings}
  )
  config.validate('rollout.server')
  assets = hf_export.Assets(tokenizer)

  def export(target: pathlib.Path, params: Any) -> None:
    hf_export.export_policy(target, MODEL, params['policy'], assets, dtype=config.dtype)

  served = Served(export, MODEL.vocab_size, PAD, COPIES)
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  return HttpEngine(config, Wanted(0.7, R, STOPS, None), served, weights, mesh)


@pytest.fixture(params=DIALECTS)
def both(
  request: pytest.FixtureRequest, tokenizer: pathlib.Path, tmp_path: pathlib.Path
) -> Iterator[Both]:
  with stand_in.running(request.param) as server:
    server.know(KEY, len(TOKENS) * COPIES)
    engine = make_engine(server, tokenizer, tmp_path / 'weights')
    try:
      yield Both(server, engine)
    finally:
      engine.close()


def test_every_dialect_has_its_form() -> None:
  assert tuple(dialects.DIALECTS) == DIALECTS


def test_it_samples_what_this_process_would(both: Both) -> None:
  """The same tokens, masks, ends and log-probs, from prompts without their padding."""
  both.engine.sync_weights(params_of(0), 3)
  found, expected = both.generate(), sampled_here(params_of(0))
  np.testing.assert_array_equal(found.sequences.response, expected.tokens)
  np.testing.assert_array_equal(found.sequences.response_mask, expected.mask)
  np.testing.assert_array_equal(found.finished, expected.finished)
  assert found.logprobs is not None
  np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)
  np.testing.assert_array_equal(found.sequences.prompt, TOKENS.repeat(COPIES, axis=0))
  assert 0 < expected.finished.sum() < len(expected.finished)
  assert (expected.tokens[0] != expected.tokens[1]).any(), 'copies of a prompt differ'


def test_weights_are_handed_over(both: Both, tmp_path: pathlib.Path) -> None:
  """The server samples with the new ones; the same arrays are sent once; one folder is kept."""
  both.engine.sync_weights(params_of(0), 0)
  first = both.generate()
  both.engine.sync_weights(dict(params_of(0)), 1)
  assert [folder.name for folder in both.server.loaded] == ['00000000']
  both.engine.sync_weights(params_of(1), 1)
  second, expected = both.generate(), sampled_here(params_of(1))
  assert (first.sequences.response != second.sequences.response).any()
  np.testing.assert_array_equal(second.sequences.response, expected.tokens)
  for name in ('embedding', 'unembedding'):
    own, theirs = params_of(1)['policy'].get(name), both.server.params.get(name)
    assert (own is None) == (theirs is None)
    if own is not None:
      size = MODEL.vocab_size
      own = own[:size] if name == 'embedding' else own[:, :size]
      np.testing.assert_array_equal(own, theirs)
  assert [folder.name for folder in both.server.loaded] == ['00000000', '00000001']
  assert [folder.name for folder in (tmp_path / 'weights').iterdir()] == ['00000001']
  both.engine.close()
  both.engine.close()
  assert not (tmp_path / 'weights').exists()


def test_what_an_interrupted_run_left_is_replaced(both: Both, tmp_path: pathlib.Path) -> None:
  """A folder of the same step, half written or of other weights."""
  left = tmp_path / 'weights' / '00000002'
  left.mkdir(parents=True)
  (left / 'config.json').write_text('{}')
  both.engine.sync_weights(params_of(0), 2)
  np.testing.assert_array_equal(
    both.generate().sequences.response, sampled_here(params_of(0)).tokens
  )


def test_troubles_that_pass_are_survived(both: Both) -> None:
  """Loading and sampling are tried again after 503, 429 and the like."""
  both.server.troubles.extend([(503, 'loading'), (503, 'loading')])
  both.engine.sync_weights(params_of(0), 0)
  both.server.troubles.extend([(503, 'busy'), (429, 'slow down'), (500, '')])
  found = both.generate()
  np.testing.assert_array_equal(found.sequences.response, sampled_here(params_of(0)).tokens)
  assert not both.server.troubles
  loads = 2 if both.server.dialect == 'vllm' else 1
  assert len(both.server.asked) == 1 + (2 + loads) + (3 + len(TOKENS))


def test_a_refusal_is_told_at_once(both: Both) -> None:
  """With the server's own words, and without another try."""
  both.engine.sync_weights(params_of(0), 0)
  count = len(both.server.asked)
  both.server.troubles.extend([(400, 'prompt is too long')] * len(TOKENS))
  with pytest.raises(ServerError, match=f'{both.server.url}/.*: it answered 400: prompt is too'):
    both.generate()
  assert len(both.server.asked) <= count + len(TOKENS)


def test_a_server_that_stays_broken(tokenizer: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """The last answer, and how often it was asked."""
  with stand_in.running('vllm') as server:
    engine = make_engine(server, tokenizer, tmp_path / 'weights', retries=2)
    server.troubles.extend([(500, 'out of memory')] * 3)
    with pytest.raises(ServerError, match=r'after 3 tries.*server.retries.*500: out of memory'):
      engine.sync_weights(params_of(0), 0)
    assert len(server.asked) == 1 + 3


def test_a_server_that_never_answers(tokenizer: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """The field that says how long it may take is named."""
  with stand_in.running('vllm') as server:
    engine = make_engine(server, tokenizer, tmp_path / 'weights', retries=0, timeout=0.2)
    server.troubles.append((0, ''))
    with pytest.raises(ServerError, match=r'1 try.*no answer within 0.2 s.*server.timeout'):
      engine.sync_weights(params_of(0), 0)


def test_a_server_that_is_not_there(tokenizer: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """Found when the engine is made: the URL and its field are named."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    server = StandIn('vllm', f'http://127.0.0.1:{free.getsockname()[1]}')
  with pytest.raises(ServerError, match=f'{server.url}/health: after 2 .*server.url right'):
    make_engine(server, tokenizer, tmp_path / 'weights', retries=1)


def test_closing_ends_what_is_under_way() -> None:
  """A request that waits for its answer fails at once, and so does whatever comes after."""
  with stand_in.running('vllm') as server:
    client = Client(ServerConfig(url=server.url, backoff=0.0))
    server.troubles.append((0, ''))
    caught: list[Exception] = []

    def ask() -> None:
      try:
        client.ask(Request('/collective_rpc', {}))
      except ServerError as error:
        caught.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not server.asked:
      time.sleep(0.01)
    client.stop()
    thread.join(timeout=20)
    assert not thread.is_alive() and len(caught) == 1
    with pytest.raises(ServerError, match='given up'):
      client.ask(Request('/health'))


def test_closing_ends_what_is_being_opened(monkeypatch: pytest.MonkeyPatch) -> None:
  """Over a connection that is there only after the end nothing is asked."""
  opening, ended = threading.Event(), threading.Event()
  connect = http.client.HTTPConnection.connect

  def slow(connection: http.client.HTTPConnection) -> None:
    opening.set()
    assert ended.wait(timeout=20)
    connect(connection)

  monkeypatch.setattr(http.client.HTTPConnection, 'connect', slow)
  with stand_in.running('vllm') as server:
    client = Client(ServerConfig(url=server.url, retries=0))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      asked = pool.submit(client.ask, Request('/health'))
      assert opening.wait(timeout=20)
      client.stop()
      ended.set()
      with pytest.raises(ServerError, match='given up'):
        asked.result(timeout=20)
    assert not server.asked


def change(dialect: str, answer: Any, **changes: Any) -> Any:
  """An answer whose first response has other `tokens`, `logprobs`, `reason` or `version`."""
  if dialect == 'vllm':
    row = next(choice for choice in answer['choices'] if choice['index'] == 0)
    tokens = changes.get('tokens', row['token_ids'])
    row['token_ids'] = tokens
    row['finish_reason'] = changes.get('reason', row['finish_reason'])
    row['logprobs']['token_logprobs'] = changes.get('logprobs', [-1.0] * len(tokens))
    return answer
  about = answer[0]['meta_info']
  tokens = changes.get('tokens', [token for _, token, _ in about['output_token_logprobs']])
  logprobs = changes.get('logprobs', [-1.0] * len(tokens))
  about['output_token_logprobs'] = [
    [logprob, token, None] for logprob, token in zip(logprobs, tokens, strict=True)
  ]
  about['finish_reason']['type'] = changes.get('reason', about['finish_reason']['type'])
  about['weight_version'] = changes.get('version', about['weight_version'])
  return answer


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'tokens': [3, MODEL.vocab_size, EOS]}, 'token 20 is none of the 20'),
    ({'tokens': [-1, EOS]}, 'token -1 is none'),
    ({'tokens': ['a', EOS]}, "token 'a' is none"),
    ({'tokens': [True, EOS]}, 'token True is none'),
    ({'tokens': []}, '0 tokens: expected 1 to 6'),
    ({'tokens': [3] * 7}, '7 tokens'),
    ({'tokens': [3, EOS, 3, EOS]}, 'goes on after a stop token'),
    ({'tokens': [3, 4]}, 'ends after 2 of 6 tokens, with 4, which is no stop token'),
    ({'reason': 'abort'}, "ended a response for 'abort'"),
    ({'tokens': [EOS], 'logprobs': [float('nan')]}, 'log-probs'),
    ({'tokens': [EOS], 'logprobs': [None]}, 'not an answer of'),
  ],
)
def test_responses_that_cannot_be_learnt_from(
  both: Both, changes: dict[str, Any], words: str
) -> None:
  """None is mended, and none is left out: the error says what came."""
  both.engine.sync_weights(params_of(0), 0)
  both.server.spoil = lambda answer: change(both.server.dialect, answer, **changes)
  with pytest.raises(ServerError, match=words):
    both.generate()


def test_a_response_may_end_at_its_longest(both: Both) -> None:
  """With a stop token in the last place it has stopped, whatever the server says; else not."""
  both.engine.sync_weights(params_of(0), 0)
  for last, finished in ((EOS, True), (3, False)):
    changes = {'tokens': [3] * (R - 1) + [last], 'reason': 'length'}
    both.server.spoil = functools.partial(change, both.server.dialect, **changes)
    found = both.generate()
    assert found.finished[::COPIES].tolist() == [finished] * len(TOKENS)


@pytest.mark.parametrize(
  'answer', [{}, [], {'choices': [{}]}, [{'meta_info': {}}], 'text', None, [3]]
)
def test_answers_of_something_else(both: Both, answer: Any) -> None:
  """Another program, or another dialect."""
  both.engine.sync_weights(params_of(0), 0)
  both.server.spoil = lambda _: answer
  with pytest.raises(ServerError, match='(not an answer of .*server.dialect|0 responses)'):
    both.generate()


def test_too_few_responses(both: Both) -> None:
  """One of two."""
  both.engine.sync_weights(params_of(0), 0)

  def drop(answer: Any) -> Any:
    return {'choices': answer['choices'][:1]} if isinstance(answer, dict) else answer[:1]

  both.server.spoil = drop
  with pytest.raises(ServerError, match='1 responses in the place of 2'):
    both.generate()


def test_a_server_without_logprobs(both: Both) -> None:
  """They are then unknown, not zero."""
  if both.server.dialect != 'vllm':
    pytest.skip('its tokens come with their log-probs')
  both.engine.sync_weights(params_of(0), 0)

  def hide(answer: Any) -> Any:
    for choice in answer['choices']:
      choice['logprobs'] = None
    return answer

  both.server.spoil = hide
  assert both.generate().logprobs is None


def test_stale_weights_are_refused(both: Both) -> None:
  """Where the server says which it has: it was started anew, or is another run's too."""
  if both.server.dialect != 'sglang':
    pytest.skip('it does not say')
  both.engine.sync_weights(params_of(0), 4)
  both.server.version = 'default'
  with pytest.raises(ServerError, match="weights 'default', not of '.*00000004'"):
    both.generate()


def test_weights_that_are_not_loaded(tokenizer: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """SGLang may say so in an answer like any other."""
  with stand_in.running('sglang') as server:
    engine = make_engine(server, tokenizer, tmp_path / 'weights')
    server.troubles.append((200, '{"success": false, "message": "no such file"}'))
    with pytest.raises(ServerError, match='did not load .*00000007.*no such file'):
      engine.sync_weights(params_of(0), 7)
    server.troubles.append((200, 'oops'))
    with pytest.raises(ServerError, match='not JSON: oops'):
      engine.sync_weights(params_of(0), 7)
