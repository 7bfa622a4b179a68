"""What all programs share: flags, one clear message for the user's mistakes, exit codes."""

import dataclasses
import errno
import logging as standard_logging
import os
import pathlib
import re
import signal
import sys
import threading
import traceback
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from rlhf_jax.common import allocation, processes
from rlhf_jax.common.errors import UserError
from rlhf_jax.config import load_config
from rlhf_jax.config_values import suggestion
from rlhf_jax.hf_folder import open_source
from rlhf_jax.runs import Run
from rlhf_jax.stages import StoppedError

DONE, USER_ERROR, STOPPED = 0, 1, 75
INTERRUPTED = 130  # Ctrl-C in a program with nothing to go on from
SHARED = ('config', 'cache_dir', 'debug')
# What storage does to programs that are right.
_STORAGE = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EROFS,
  errno.EEXIST,
  errno.ENOTDIR,
  errno.EACCES,
  errno.EPERM,
  errno.EIO,
  errno.ESTALE,
)
# Of fields that may have none, which the flag library would read as a number or a text.
_NONE = re.compile(r'--config\.(.+)=None')
_NONES: list[str] = []
_AGAIN = 'Mend the cause, and run the same command again to go on.'

flags.DEFINE_bool('debug', False, 'Show tracebacks of errors, and check every operation for nan.')
flags.DEFINE_string(
  'cache_dir',
  os.environ.get('JAX_COMPILATION_CACHE_DIR', '~/.cache/rlhf_jax/xla'),
  'Folder of compiled programs, shared by runs; empty: compile anew every time.',
)


def define_config(help_text: str) -> flags.FlagHolder:
  """The --config flag; `--config.a.b=value` sets a field."""
  return config_flags.DEFINE_config_file('config', None, help_text)


def given(flag: flags.FlagHolder) -> Any:
  """The config of a --config flag; 'None' given for an optional field means None.

  Raises UserError when its file is missing, or gives something else than a config.
  """
  config = flag.value
  if not dataclasses.is_dataclass(config):  # where it could not be read, a stand-in
    config_flag: Any = flags.FLAGS[flag.name]
    config = load_config(config_flag.config_filename)
    raise UserError(
      f'--config: expected a config dataclass from get_config(), got {type(config).__name__}.'
    )
  for path in _NONES:
    set_none(config, path)
  return config


def set_none(config: Any, path: str) -> None:
  """Sets what `--config.PATH=None` names; raises UserError where it cannot be None."""
  owner, name = _owner(config, path)
  if type(None) not in typing.get_args(typing.get_type_hints(type(owner)).get(name)):
    raise UserError(f'--config.{path}=None: it must have a value; --help lists the options.')
  setattr(owner, name, None)


def _owner(holder: Any, path: str) -> tuple[Any, str]:
  """What a path like 'rollout.rewards[0].weight' is a field of, and the field.

  Raises UserError for a part of it that names nothing, with what was probably meant.
  """
  *parts, last = path.split('.')
  for part in [*parts, last]:
    owner = holder
    name, _, number = part.rstrip(']').partition('[')
    fields = holder if isinstance(holder, dict) else getattr(holder, '__dataclass_fields__', {})
    if name not in fields:
      raise UserError(
        f'--config.{path}: {type(holder).__name__} has no {name!r}; {suggestion(name, fields)}'
      )
    holder = holder[name] if isinstance(holder, dict) else getattr(holder, name)
    if number:
      entries = holder if isinstance(holder, tuple) else ()
      if not number.isdigit() or int(number) >= len(entries):
        raise UserError(
          f'--config.{path}: {name} has {len(entries)} entries, [0] the first; flags change those '
          'that are there, and further ones are written in a config file.'
        )
      holder = entries[int(number)]
  return owner, last


def run_or_model(run: str | None, model: str | None) -> Run:
  """What --run or --model names; raises UserError unless it is one of the two."""
  source = run if model is None else model
  if source is None or (run is not None and model is not None):
    raise UserError('--run, --model: give one of them: a finished run, or a checkpoint folder.')
  return open_source(source)


def not_none(values: dict[str, Any]) -> dict[str, Any]:
  """The settings that were given; a flag that was not is None."""
  return {name: value for name, value in values.items() if value is not None}


def json_path(value: str | None) -> pathlib.Path | None:
  """Where a --json flag asks for numbers; raises UserError if that cannot be a file."""
  if value is None:
    return None
  path = pathlib.Path(value)
  if not path.parent.is_dir():
    raise UserError(f'--json={path}: there is no folder {path.parent}.')
  if path.is_dir():
    raise UserError(f'--json={path}: a folder; name a file in it.')
  return path


def hush_aftermath(shown: Callable[[Any], Any]) -> Callable[[Any], None]:
  """A hook that leaves out what is left of a checkpoint's writes once one of them has failed.

  The others report to a loop of orbax's that is closed by then; the failure itself is said by
  whoever waits for the checkpoint. All else goes to `shown`.
  """

  def hook(unraisable: Any) -> None:
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == 'Event loop is closed'):
      shown(unraisable)

  return hook


def run(main: Callable[[], int], *, resumable: bool = False) -> None:
  """Runs a program and exits with its code.

  What the user got wrong (flags, config, data, run directories) ends with its message alone and
  code 1; `--debug` shows the traceback. A stop on request of a resumable program ends with code 75.
  """

  def guarded(argv: Sequence[str]) -> None:
    if len(argv) > 1:
      fail(f'{argv[1]}: not understood; every option has the form --name=value (see --help).')
    logging.set_verbosity(logging.WARNING)
    if not flags.FLAGS.debug:  # it logs the tracebacks of errors that it raises as well
      standard_logging.getLogger('absl').addFilter(lambda record: '/orbax/' not in record.pathname)
      sys.unraisablehook = hush_aftermath(sys.unraisablehook)
    if int(os.environ.get('JAX_NUM_CPU_DEVICES') or 1) > 1:
      # A simulated device holds a thread while it waits for another: with only as many threads as
      # there are cores, programs that overlap can come to wait for each other without end.
      os.environ.setdefault('PJRT_NPROC', '32')
    allocation.keep_memory()
    if flags.FLAGS.debug:
      jax.config.update('jax_debug_nans', True)
    if flags.FLAGS.cache_dir:
      jax.config.update('jax_compilation_cache_dir', os.path.expanduser(flags.FLAGS.cache_dir))
      jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    for number in (signal.SIGTERM, signal.SIGINT) if resumable else ():
      # Between training loops, which end their step first, nothing is lost by stopping at once.
      signal.signal(number, _stop)
    try:
      sys.exit(main())
    except StoppedError:
      if processes.is_main():
        print('stopped; run the same command again to go on', file=sys.stderr)
      sys.exit(STOPPED)
    except KeyboardInterrupt:
      sys.exit(INTERRUPTED)
    except UserError as error:
      fail(str(error))
    except OSError as error:
      message = storage_message(error, resumable=resumable)
      if message is None or flags.FLAGS.debug:
        raise
      fail(message)

  # --help shows the flags of the program's own module: these belong to every program.
  for name in SHARED:
    if name in flags.FLAGS:
      flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
  app.run(guarded, flags_parser=parse)


def storage_message(error: OSError, *, resumable: bool) -> str | None:
  """What to tell the user of an error of storage; None for any other error."""
  if error.errno not in _STORAGE:
    return None
  return f'{error.filename or "a file"}: {error.strerror}. {_AGAIN if resumable else ""}'.strip()


def _stop(number: int, frame: object) -> NoReturn:
  raise StoppedError(signal.Signals(number).name)


def parse(argv: Sequence[str]) -> list[str]:
  """Parses flags; unknown config fields and wrong types end with a message, not a traceback."""
  nones = [match for match in map(_NONE.fullmatch, argv) if match]
  _NONES[:] = [match[1] for match in nones]
  try:
    return flags.FLAGS([text for text in argv if not _NONE.fullmatch(text)])
  except SystemExit:  # of --help, which the flag library takes for a failure
    sys.exit(DONE)
  except Exception as error:  # of the flag library, or of the user's config file
    if '--debug' in argv:
      traceback.print_exc()
    fail(_what_was_wrong(argv) or f'{error} (--help lists the options)')


def _what_was_wrong(argv: Sequence[str]) -> str | None:
  """A better message than the flag library's, where there is one."""
  try:
    return unknown_field(argv)
  except UserError as error:
    return str(error)


def unknown_field(argv: Sequence[str]) -> str | None:
  """Says which `--config.a.b=` names nothing in the config, and what was probably meant."""
  files = [text.partition('=')[2] for text in argv if text.startswith('--config=')]
  if not files:
    return None
  config = load_config(files[-1])
  try:
    for text in argv:
      if text.startswith('--config.'):
        _owner(config, text.partition('=')[0].removeprefix('--config.'))
  except UserError as error:
    return str(error)
  return None


def fail(message: str) -> NoReturn:
  """Prints a message and exits with the code of a user's mistake."""
  if flags.FLAGS.is_parsed() and flags.FLAGS.debug:
    traceback.print_exc()
  print(f'error: {message}', file=sys.stderr)
  if any(not thread.daemon for thread in threading.enumerate()[1:]):
    # What failed may have left threads that wait without end, which an orderly exit would wait for.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(USER_ERROR)
  sys.exit(USER_ERROR)
