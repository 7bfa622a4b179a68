"""Programs that run as several processes: how they find each other, and how they fail together.

The flags below, or else what Slurm, Open MPI or Cloud TPU tells the tasks it has started, lead to
`jax.distributed`. A program that was started alone stays alone.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
from absl import flags

from experiments import cli
from rlhf_jax.common import processes
from rlhf_jax.common.errors import UserError

COORDINATOR = flags.DEFINE_string(
  'coordinator_address', None, 'HOST:PORT where process 0 listens, if this is one of several.'
)
NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many processes there are.', 1)
PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0.', 0)
FLAGS = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)

# Clusters that jax finds by itself; under Kubernetes even a process alone would look like one.
_CLUSTERS = ('slurm', 'ompi', 'gcetpu', 'gketpu')
_CONNECT_SECONDS = 300
_CPU_THREADS = 64
# How long a process that ends waits for the others to end; they do so together.
_SHUTDOWN_SECONDS = 60
# How often a process looks whether another one has failed, and how long that one lets them look.
_WATCH_SECONDS = 0.5
_GRACE_SECONDS = 2.0
_FAILURE = 'rlhf_jax/failure'


class Group(NamedTuple):
  """Where the processes of a program meet, and which this one is.

  Attributes:
    coordinator: HOST:PORT of process 0.
    processes: how many there are.
    process: this one's number.
    devices: numbers of the machine's accelerators that are this process's; None: all it sees.
  """

  coordinator: str
  processes: int
  process: int
  devices: list[int] | None = None


def joined(main: Callable[[], int], *, resumable: bool = False) -> Callable[[], int]:
  """The main function of a program whose processes find each other, and end together.

  An error in one of them is told once and ends all, with the same exit code. A resumable program
  leaves SIGTERM to its training loops; another one is ended by it.
  """
  for flag in FLAGS:  # for --help
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])

  def run() -> int:
    group = given() or detected()
    if group is None or group.processes == 1:
      return main()
    join(group)
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(ended,), daemon=True)
    watch.start()
    if not resumable:
      signal.signal(signal.SIGTERM, signal.SIG_DFL)  # jax has taken it
    try:
      code = main()
      processes.barrier('end')
      return code
    except UserError as error:
      fail(f'error: {error}', 1)
    except KeyboardInterrupt:
      fail('interrupted', 130)
    except Exception as error:
      storage = isinstance(error, OSError) and cli.storage_message(error, resumable=resumable)
      fail(f'error: {storage}' if storage else traceback.format_exc(), 1)
    finally:  # an orderly end, which jax's service does not outlive
      ended.set()
      watch.join()

  return run


def join(group: Group) -> None:
  """Joins the other processes; before jax is used otherwise.

  Raises UserError if they do not come.
  """
  # On CPUs a collective holds a thread while it waits for other processes. With only as many as
  # there are cores, programs that overlap can come to wait for each other without end.
  os.environ.setdefault('PJRT_NPROC', str(_CPU_THREADS))
  try:
    jax.distributed.initialize(
      group.coordinator,
      group.processes,
      group.process,
      local_device_ids=group.devices,
      cluster_detection_method='deactivate',
      initialization_timeout=_CONNECT_SECONDS,
      shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
  except (RuntimeError, ValueError) as error:
    raise UserError(
      f'--coordinator_address={group.coordinator}: process {group.process} of {group.processes} '
      f'could not join the others: {error}'
    ) from error


def given() -> Group | None:
  """What the flags say; None without any. Raises UserError for some without the others."""
  address, count, number = COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value
  missing = [f'--{flag.name}' for flag in FLAGS if flag.value is None]
  if len(missing) == len(FLAGS):
    return None
  if address is None or count is None or number is None:
    raise UserError(
      f'{", ".join(missing)}: missing. Give --coordinator_address=HOST:PORT, --num_processes and '
      '--process_id to each process, or none of them.'
    )
  host, _, port = address.rpartition(':')
  if not host or not port.isdigit():
    raise UserError(f'--coordinator_address={address}: expected HOST:PORT.')
  if number >= count:
    raise UserError(f'--process_id={number}: expected less than --num_processes={count}.')
  return Group(address, count, number)


def detected() -> Group | None:
  """The group that a cluster has started this process in; None where it is alone."""
  from jax._src.clusters import ClusterEnv  # as jax.distributed does, which would not count first

  if int(os.environ.get('SLURM_STEP_NUM_TASKS', 1)) == 1 and 'SLURM_JOB_ID' in os.environ:
    return None  # a batch script or a step of one task, in an allocation that may be larger
  for cluster in ClusterEnv._cluster_types:
    if cluster.name in _CLUSTERS and cluster.is_env_present():
      count = cluster.get_process_count()
      if count == 1:
        return None
      address = cluster.get_coordinator_address(
        timeout_secs=_CONNECT_SECONDS,
        override_coordinator_port=os.environ.get('JAX_COORDINATOR_PORT'),
      )
      return Group(address, count, cluster.get_process_id(), _own_devices(cluster))
  if int(os.environ.get('OMPI_COMM_WORLD_SIZE', 1)) > 1:
    raise UserError(
      'Open MPI has started several processes and does not say where they can meet: give each '
      '--coordinator_address=HOST:PORT --num_processes=$OMPI_COMM_WORLD_SIZE '
      '--process_id=$OMPI_COMM_WORLD_RANK.'
    )
  return None


def _own_devices(cluster: Any) -> list[int] | None:
  """One accelerator for each of several tasks on a machine; all for a task alone there.

  A task that sees a single one already has its own. `JAX_LOCAL_DEVICE_IDS` has the last word.
  """
  local = cluster.get_local_process_id()
  visible = os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',')
  if local is None or 'JAX_LOCAL_DEVICE_IDS' in os.environ or (len(visible) == 1 and visible[0]):
    return None
  return [local] if _tasks_here() > 1 else None


def _tasks_here() -> int:
  """How many tasks of this step run on this machine."""
  environment = os.environ
  if 'OMPI_COMM_WORLD_LOCAL_SIZE' in environment:
    return int(environment['OMPI_COMM_WORLD_LOCAL_SIZE'])
  # '2(x3),1': two tasks on each of three nodes, one on the fourth.
  counts = []
  for part in environment.get('SLURM_STEP_TASKS_PER_NODE', '1').split(','):
    tasks, _, nodes = part.rstrip(')').partition('(x')
    counts += [int(tasks)] * int(nodes or 1)
  return counts[min(int(environment.get('SLURM_NODEID', 0)), len(counts) - 1)]


def fail(message: str, code: int) -> NoReturn:
  """Ends this process and all others with an error, of which the first is told by process 0.

  At once: what jax does at an orderly end would wait for processes that wait for this one.
  """
  note = json.dumps({'process': jax.process_index(), 'code': code, 'message': message})
  try:
    processes.client().key_value_set(_FAILURE, note)
    told = not processes.is_main()
  except Exception as error:  # jax's own, of no public type
    told = 'ALREADY_EXISTS' in str(error)
  _leave(None if told else message, code)


def _watch(ended: threading.Event) -> None:
  """Ends this process when another one has failed; its own thread may be waiting for that one."""
  while not ended.wait(_WATCH_SECONDS):
    try:
      note = json.loads(processes.client().key_value_try_get(_FAILURE))
    except Exception as error:  # jax's own, of no public type
      if 'NOT_FOUND' in str(error):
        continue
      return  # the service is gone: jax ends the program
    if note['process'] == jax.process_index():
      return
    message = f'{note["message"]} (process {note["process"]})' if processes.is_main() else None
    _leave(message, note['code'])


def _leave(message: str | None, code: int) -> NoReturn:
  if message is not None:
    print(message, file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  if processes.is_main():
    time.sleep(_GRACE_SECONDS)  # the others ask it what has happened
  else:
    time.sleep(_WATCH_SECONDS)
  os._exit(code)
