"""Where a process is told, or finds out, which of several it is."""

from collections.abc import Callable
from typing import Any

import pytest
from absl import flags

from experiments import cluster
from experiments.cluster import Group
from rlhf_jax.common.errors import UserError

Tell = Callable[[dict[str, str]], Group | None]
STEP = {
  'SLURM_JOB_ID': '4097',
  'SLURM_STEP_NODELIST': 'node[03-04],other',
  'SLURM_NTASKS': '3',
  'SLURM_STEP_NUM_TASKS': '3',
  'SLURM_STEP_NUM_NODES': '3',
  'SLURM_STEP_TASKS_PER_NODE': '1(x3)',
  'SLURM_PROCID': '2',
  'SLURM_NODEID': '2',
  'SLURM_LOCALID': '0',
}
CROWDED = STEP | {
  'SLURM_NTASKS': '5',
  'SLURM_STEP_NUM_TASKS': '5',
  'SLURM_STEP_TASKS_PER_NODE': '2(x2),1',
  'SLURM_PROCID': '3',
  'SLURM_NODEID': '1',
  'SLURM_LOCALID': '1',
}
MPI = {
  'OMPI_COMM_WORLD_SIZE': '4',
  'OMPI_COMM_WORLD_RANK': '1',
  'OMPI_COMM_WORLD_LOCAL_RANK': '1',
  'OMPI_COMM_WORLD_LOCAL_SIZE': '4',
}
ORTE = {'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911'}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Tell:
  """Sets the environment, of which nothing else is there."""
  for prefix in ('SLURM_', 'OMPI_', 'TPU_', 'JAX_LOCAL', 'JAX_COORD', 'CUDA_VISIBLE'):
    for name in [name for name in cluster.os.environ if name.startswith(prefix)]:
      monkeypatch.delenv(name)

  def tell(environment: dict[str, str]) -> Group | None:
    for name, value in environment.items():
      monkeypatch.setenv(name, value)
    return cluster.detected()

  return tell


@pytest.mark.parametrize(
  ('environment', 'expected'),
  [
    ({}, None),
    (STEP, Group('node03:61441', 3, 2)),
    (CROWDED, Group('node03:61441', 5, 3, [1])),
    (CROWDED | {'CUDA_VISIBLE_DEVICES': '0'}, Group('node03:61441', 5, 3)),
    (CROWDED | {'JAX_LOCAL_DEVICE_IDS': '0,1'}, Group('node03:61441', 5, 3)),
    # The last node has one task, which takes all that is there.
    (
      CROWDED | {'SLURM_PROCID': '4', 'SLURM_NODEID': '2', 'SLURM_LOCALID': '0'},
      Group('node03:61441', 5, 4),
    ),
    (STEP | {'JAX_COORDINATOR_PORT': '77'}, Group('node03:77', 3, 2)),
    (MPI | ORTE, Group('10.96.0.1:62624', 4, 1, [1])),
    (MPI | ORTE | {'OMPI_COMM_WORLD_SIZE': '1'}, None),
  ],
)
def test_a_cluster_tells_its_tasks(
  told: Tell, environment: dict[str, str], expected: Group | None
) -> None:
  """Addresses as jax makes them; a task alone on its machine has all accelerators."""
  assert told(environment) == expected


def test_a_process_alone_never_waits(told: Tell) -> None:
  """A step of one task, and a batch script, in an allocation for several."""
  assert told(STEP | {'SLURM_STEP_NUM_TASKS': '1'}) is None
  assert told({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '0'}) is None


def test_processes_without_a_place_to_meet_are_told_to_name_one(told: Tell) -> None:
  """Open MPI 5 does not say it."""
  with pytest.raises(UserError, match=r'--coordinator_address=HOST:PORT.*OMPI_COMM_WORLD_SIZE'):
    told(MPI)


@pytest.mark.parametrize(
  ('values', 'expected'),
  [
    ((None, None, None), None),
    (('host:80', 2, 1), Group('host:80', 2, 1)),
    (('host:80', None, 1), 'num_processes: missing'),
    ((None, 2, None), '--coordinator_address, --process_id: missing'),
    (('host', 2, 0), 'expected HOST:PORT'),
    (('host:80', 2, 2), r'--process_id=2: expected less than --num_processes=2'),
  ],
)
def test_flags_say_all_or_nothing(values: tuple[Any, ...], expected: Any) -> None:
  """The flags win over the cluster; some without the others are an error that names them."""
  saved = [flags.FLAGS[flag.name].value for flag in cluster.FLAGS]
  try:
    for flag, value in zip(cluster.FLAGS, values, strict=True):
      flags.FLAGS[flag.name].value = value
    if isinstance(expected, str):
      with pytest.raises(UserError, match=expected):
        cluster.given()
    else:
      assert cluster.given() == expected
  finally:
    for flag, value in zip(cluster.FLAGS, saved, strict=True):
      flags.FLAGS[flag.name].value = value
