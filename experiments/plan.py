"""Says what a stage takes on a mesh of accelerators, before there is one.

  python -m experiments.plan --config=configs/plan_llama_70b.py --accelerator=H100 \\
    --config.mesh.data=1 --config.mesh.fsdp=32 --config.mesh.tensor=8

The stage's programs (update, scoring, generation, evaluations) are compiled ahead of time for as
many simulated devices as the mesh has, from shapes alone: no weights, no data, no accelerator. It
prints the memory of a device by role, operations and traffic of a step, the largest arrays, and
whether that fits. Models that the stage starts from may be run directories, checkpoint folders (of
the hub too: nothing but their config is downloaded) or configs that were never run.

Exit codes: 0 done (whether it fits or not), 1 something given is wrong (one message says what).
"""

import json
import math
import sys

import jax
from absl import flags

from experiments import cli
from rlhf_jax.common.errors import UserError
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.planning.accelerators import ACCELERATORS, judged
from rlhf_jax.planning.plan import as_json, make_plan
from rlhf_jax.planning.report import lines
from rlhf_jax.planning.stage import plan_stage
from rlhf_jax.sharding.mesh import make_mesh

CONFIG = cli.define_config('The stage: a file that defines get_config(), such as configs/dpo.py.')
DEVICES = flags.DEFINE_integer(
  'devices', None, 'How many devices; needed only where a size of the mesh is -1.', 1
)
ACCELERATOR = flags.DEFINE_string(
  'accelerator',
  None,
  f'The device to judge by, one of {", ".join(ACCELERATORS)}; default: each of them.',
)
VOCAB_SIZE = flags.DEFINE_integer(
  'vocab_size', 0, 'Ids of the tokenizer, where the decoder is a new one and its config says 0.', 0
)
JSON = flags.DEFINE_string('json', None, 'Also write all numbers to this file.')


def main() -> int:
  config = cli.given(CONFIG)
  if not isinstance(config, ExperimentConfig):
    raise UserError(
      f'--config: expected an ExperimentConfig from get_config(), got {type(config).__name__}. '
      'The stages of a study are planned one by one.'
    )
  path = cli.json_path(JSON.value)
  judged(ACCELERATOR.value)
  sizes = [config.mesh.data, config.mesh.fsdp, config.mesh.tensor]
  if -1 in sizes and DEVICES.value is None:
    raise UserError('--devices: needed, since a size of config.mesh is -1.')
  config.mesh.validate('mesh')
  devices = DEVICES.value if DEVICES.value is not None else math.prod(sizes)
  # Simulated, whatever this machine has; compiled programs of such a size are not worth keeping.
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', devices)
  jax.config.update('jax_enable_compilation_cache', False)
  config.validate()
  stage = plan_stage(config, make_mesh(config.mesh), VOCAB_SIZE.value)
  plan = make_plan(stage, lambda text: print(f'{config.name}: {text}', file=sys.stderr, flush=True))
  for line in lines(plan, ACCELERATOR.value):
    print(line)
  if path is not None:
    path.write_text(json.dumps(as_json(plan), indent=2) + '\n', 'utf-8')
  return cli.DONE


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  cli.run(main)
