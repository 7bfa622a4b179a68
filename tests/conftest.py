"""What every test shares: the platform, eight simulated devices, compiled programs kept, the data.

`RLHF_JAX_TEST_PLATFORM=cuda,cpu` runs the tests on another platform than the CPU, and
`JAX_COMPILATION_CACHE_DIR` keeps compiled programs elsewhere than in `.cache/xla`.
"""

import gc
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Through the environment, before jax is imported, so that programs started by tests get them too.
os.environ['JAX_PLATFORMS'] = os.environ.get('RLHF_JAX_TEST_PLATFORM', 'cpu')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.cache' / 'xla'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '0')
# A simulated device holds a thread while it waits for another: with only as many threads as there
# are cores, programs that overlap can come to wait for each other without end.
os.environ.setdefault('PJRT_NPROC', '32')
_XLA_FLAGS = [
  # XLA ends a process when a simulated device waits 40 s for another: on a busy machine that is no
  # sign of a deadlock.
  '--xla_cpu_collective_call_terminate_timeout_seconds=600',
  # Tests compile much and compute little: programs are compiled in a quarter of the time.
  '--xla_backend_optimization_level=0',
  '--xla_llvm_disable_expensive_passes=true',
]
if tuple(map(int, importlib.metadata.version('jaxlib').split('.')[:2])) < (0, 11):
  _XLA_FLAGS.append('--xla_cpu_use_fusion_emitters=false')  # unknown to later versions
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *_XLA_FLAGS]).strip()

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

# Tracing allocates much that lives long: looking through it for garbage as often as Python would
# takes a tenth of the time.
gc.set_threshold(50_000, 20, 20)

# Not through the environment: a program that a test starts has one device, as a user's has.
jax.config.update('jax_num_cpu_devices', 8)

# Worker processes of grain read absl flags, which only a program's main would parse.
flags.FLAGS.mark_as_parsed()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Skips tests marked `gpu` where there is none."""
  marked = [item for item in items if item.get_closest_marker('gpu')]
  if not marked:
    return
  backend = jax.default_backend()
  if backend == 'gpu':
    return
  reason = f'needs a GPU, has {backend!r} (RLHF_JAX_TEST_PLATFORM=cuda,cpu makes tests use one)'
  for item in marked:
    item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope='session')
def shared_data() -> Path:
  """The folder of real data sets beside the checkout; its tests are skipped where it is missing."""
  folder = ROOT.parent / 'shared' / 'data'
  if not folder.is_dir():
    pytest.skip(f'no real data: {folder} does not exist')
  return folder


@pytest.fixture
def young_heap() -> Iterator[None]:
  """What other tests have left is not searched by each `gc.collect`, which would take seconds."""
  gc.collect()
  gc.freeze()
  yield
  gc.unfreeze()


@pytest.fixture(scope='session')
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A folder with a finished tiny SFT policy and reward model, `sft` and `reward_model`."""
  from tests import tiny

  return tiny.make_parents(tmp_path_factory.mktemp('parents'))
