"""Runs programs in forks of a process that has imported what they all need: seconds less for each.

One JSON request a line on standard input: module, flags, directory, environment, and the files of
its three standard streams. One JSON answer a line: the exit code. What jax reads of the environment
when it is imported is that of this process. Nothing here may use jax's backends or start threads.
"""

import atexit
import json
import os
import runpy
import sys
import threading
import traceback


def preload() -> None:
  """Imports the libraries, and of the project what defines no flags."""
  import flax.linen  # noqa: F401
  import ml_collections.config_flags  # noqa: F401
  import optax  # noqa: F401
  from orbax.checkpoint import v1  # noqa: F401

  import rlhf_jax.stages
  import rlhf_jax.study  # noqa: F401


def run(request: dict) -> int:
  """What a fork does: becomes the program, as the command line would start it."""
  for number, path in enumerate(request['files']):
    flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    os.dup2(os.open(path, flags), number)
  os.chdir(request['directory'])
  os.environ.clear()
  os.environ.update(request['environment'])
  sys.argv[:] = [request['module'], *request['flags']]
  code = 0
  try:
    runpy.run_module(request['module'], run_name='__main__', alter_sys=True)
  except SystemExit as error:
    code = error.code if isinstance(error.code, int) else int(error.code is not None)
  except BaseException:
    traceback.print_exc()
    code = 1
  sys.stdout.flush()
  sys.stderr.flush()
  return code


def serve() -> None:
  """Answers requests until the input ends."""
  preload()
  answers = os.fdopen(os.dup(1), 'w')
  for line in sys.stdin:
    child = os.fork()
    if child == 0:
      code = run(json.loads(line))
      # An orderly end, with what is registered for it, as an interpreter of its own would have.
      threading._shutdown()  # type: ignore[attr-defined]
      atexit._run_exitfuncs()
      os._exit(code)
    _, status = os.waitpid(child, 0)
    answers.write(json.dumps(os.waitstatus_to_exitcode(status)) + '\n')
    answers.flush()


if __name__ == '__main__':
  serve()
