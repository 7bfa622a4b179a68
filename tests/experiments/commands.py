"""Runs several command lines of experiments.train in one process, to import everything once.

Reads a JSON list of lists of flags from standard input and writes a JSON list of
`[exit code, standard output, standard error]`.
"""

import contextlib
import io
import json
import sys

from absl import flags

from experiments import cli, train


def run(given: list[str]) -> tuple[object, str, str]:
  """One command line, from its flags to its exit code."""
  for name in list(flags.FLAGS):
    if name.startswith('config.'):
      delattr(flags.FLAGS, name)
    else:
      flags.FLAGS[name].unparse()
  flags.FLAGS.unparse_flags()
  sys.argv = ['experiments/train.py', *given]
  out, error = io.StringIO(), io.StringIO()
  code: object = None
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
    try:
      cli.run(train.main)
    except SystemExit as ended:
      code = ended.code
  return code, out.getvalue(), error.getvalue()


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  print(json.dumps([run(given) for given in json.load(sys.stdin)]))
