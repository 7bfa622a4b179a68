"""Does steps of the job sft, each when it is told to, as `benchmarks.peer` has it.

It is started by `benchmarks.run --job=compile`, on data that is in the folder already.
"""

import json
import pathlib
import sys

import jax
from absl import flags

from benchmarks import timing, workloads
from experiments import cli

SIZE = flags.DEFINE_enum('size', 'SMALL', list(workloads.SIZES), 'Of the decoder.')
DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of computation.')
FOLDER = flags.DEFINE_string('folder', None, 'Has data and tokenizer.', required=True)


def main() -> int:
  folder = pathlib.Path(FOLDER.value)
  ready = timing.prepare(timing.Timing('sft', SIZE.value, DTYPE.value, 1), folder)
  with jax.set_mesh(ready.built.mesh):
    print(json.dumps({'loading': ready.loading}), flush=True)
    for _ in sys.stdin:
      print(json.dumps(timing.timed(ready)()), flush=True)
  return cli.DONE


if __name__ == '__main__':
  cli.run(main)
