"""Programs on a processor keep what they free, and leave alone what a user has settled."""

import os
import platform
import subprocess
import sys

import pytest

from rlhf_jax.common import allocation
from tests.experiments.programs import ROOT

pytestmark = pytest.mark.skipif(
  platform.libc_ver()[0] != 'glibc', reason='it is the malloc of glibc that is told'
)

# Whether it does, and how many pages the kernel has had to clear for an array that is made again
# and again, of 16,384 pages each time.
PROGRAM = """
import resource
import numpy as np
from rlhf_jax.common import allocation
print(allocation.keep_memory())
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**23).sum()
before = faults()
for _ in range(4):
  np.ones(2**23).sum()
print(faults() - before)
"""


def run(**environment: str) -> tuple[bool, int]:
  own = {name: x for name, x in os.environ.items() if not name.startswith(('MALLOC_', 'GLIBC_'))}
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM],
    cwd=ROOT,
    env={**own, 'JAX_PLATFORMS': 'cpu', **environment},
    capture_output=True,
    text=True,
    check=True,
  )
  kept, faults = done.stdout.split()
  return kept == 'True', int(faults)


def test_memory_that_is_freed_is_there_for_the_next_step() -> None:
  kept, faults = run()
  assert kept and faults < 2000
  kept, faults = run(MALLOC_PERTURB_='0')
  assert not kept and faults > 4 * 16_384 / 600  # fewer where pages are huge


@pytest.mark.parametrize(
  'environment',
  [
    {'JAX_PLATFORMS': 'cuda,cpu'},
    {'MALLOC_ARENA_MAX': '4'},
    {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'},
  ],
)
def test_what_is_settled_stays(environment: dict[str, str]) -> None:
  assert not run(**environment)[0]


def test_the_environment_says_the_same_to_others() -> None:
  assert allocation.ENVIRONMENT['MALLOC_MMAP_MAX_'] == '0' and len(allocation.ENVIRONMENT) == 4
