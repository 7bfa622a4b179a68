"""JSON over HTTP to a server that samples: many requests at once, again where that may help."""

import concurrent.futures
import http.client
import json
import socket
import threading
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax.common.errors import ServerError
from rlhf_jax.rollout.config import ServerConfig

FIELD = '--config.rollout.server'
# Answers that another try may change: too slow, too many requests. So may all from 500.
_AGAIN = (408, 425, 429)
_CONNECT_SECONDS = 10.0
_LONGEST_PAUSE = 60.0
# Of an answer that a message quotes.
_QUOTED = 500


class Request(NamedTuple):
  """What is asked: a path below the server's root, and a JSON body; None asks with GET."""

  path: str
  body: Mapping[str, Any] | None = None


class Client:
  """The connection to one server. It asks for no key, and keeps none."""

  def __init__(self, config: ServerConfig):
    """Connects to nothing yet."""
    assert config.url is not None, 'validate() demands it'
    self._config = config
    self._url = urllib.parse.urlsplit(config.url.rstrip('/'))
    self._lock = threading.Lock()
    self._open: set[http.client.HTTPConnection] = set()
    self._stopped = threading.Event()

  def ask(self, request: Request) -> Any:
    """The JSON value that is answered; None for an empty answer.

    Connections that fail, time-outs, and answers that say that the server is busy or broken are
    tried again after growing pauses.

    Raises:
      ServerError: no try succeeded, the request is refused, or the answer is not JSON.
    """
    config, problem = self._config, ''
    for attempt in range(1 + config.retries):
      pause = min(config.backoff * 2 ** (attempt - 1), _LONGEST_PAUSE) if attempt else 0.0
      if self._stopped.wait(pause):
        raise self._given_up(request)
      try:
        status, text = self._once(request)
      except TimeoutError:
        problem = (
          f'no answer within {config.timeout:g} s ({FIELD}.timeout). Is it overloaded, or the '
          'responses too long for that?'
        )
      except (OSError, http.client.HTTPException) as error:
        problem = (
          f'no connection ({type(error).__name__}: {error}). Is the server up, and {FIELD}.url '
          'right?'
        )
      else:
        if 200 <= status < 300:
          return self._json(request, text)
        problem = f'it answered {status}: {text[:_QUOTED]}'
        if status < 500 and status not in _AGAIN:
          raise ServerError(f'{self._where(request)}: {problem}')
    tries = f'{1 + config.retries} tries' if config.retries else '1 try'
    raise ServerError(f'{self._where(request)}: after {tries} ({FIELD}.retries): {problem}')

  def ask_all(self, requests: Sequence[Request]) -> list[Any]:
    """The answers, in order; `concurrency` requests are under way at a time.

    Raises ServerError of the first that fails; the others are then given up.
    """
    pool = concurrent.futures.ThreadPoolExecutor(self._config.concurrency)
    try:
      futures = [pool.submit(self.ask, request) for request in requests]
      done, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
      for future in done:
        future.result()
      return [future.result() for future in futures]
    except BaseException:
      self.stop()  # or the threads would keep the program until their requests are answered
      raise
    finally:
      pool.shutdown(cancel_futures=True)

  def stop(self) -> None:
    """Ends what is under way, and answers nothing more."""
    self._stopped.set()
    with self._lock:
      for connection in self._open:
        if connection.sock is not None:
          try:
            connection.sock.shutdown(socket.SHUT_RDWR)
          except OSError:
            pass  # it is closed already

  def _once(self, request: Request) -> tuple[int, str]:
    """The status and the text of one answer."""
    assert self._url.hostname is not None, 'validate() demands it'
    secure = self._url.scheme == 'https'
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    timeout = self._config.timeout
    connection = kind(self._url.hostname, self._url.port, timeout=min(timeout, _CONNECT_SECONDS))
    with self._lock:
      self._open.add(connection)
    try:
      try:
        connection.connect()
      except TimeoutError as error:
        raise ConnectionError('it does not accept connections') from error
      with self._lock:  # a connection that was being opened had nothing that stop() could end
        if self._stopped.is_set():
          raise self._given_up(request)
      connection.sock.settimeout(timeout)
      path = self._url.path + request.path
      if request.body is None:
        connection.request('GET', path)
      else:
        headers = {'Content-Type': 'application/json'}
        connection.request('POST', path, json.dumps(request.body).encode(), headers)
      answer = connection.getresponse()
      return answer.status, answer.read().decode('utf-8', errors='replace')
    finally:
      with self._lock:
        self._open.discard(connection)
      connection.close()

  def _json(self, request: Request, text: str) -> Any:
    if not text.strip():
      return None
    try:
      return json.loads(text)
    except ValueError as error:
      # Servers also answer some calls by a word or a page, which then says nothing that matters.
      if request.body is None:
        return None
      raise ServerError(
        f'{self._where(request)}: its answer is not JSON: {text[:_QUOTED]}'
      ) from error

  def _given_up(self, request: Request) -> ServerError:
    return ServerError(f'{self._where(request)}: given up.')

  def _where(self, request: Request) -> str:
    return f'{self._config.url}{request.path}'
