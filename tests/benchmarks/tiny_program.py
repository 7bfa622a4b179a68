"""Runs a program of benchmarks with a decoder that takes no time: `tiny_program MODULE FLAGS`."""

import dataclasses
import runpy
import sys

from benchmarks import workloads
from tests import tiny

TINY = dataclasses.replace(tiny.MODEL, vocab_size=40, vocab_multiple=1, max_length=512)


def main() -> None:
  _, module, *options = sys.argv
  workloads.SIZES = {'SMALL': TINY}
  sys.argv = [module, *options]
  runpy.run_module(module, run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  main()
