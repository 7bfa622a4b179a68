"""Trains one stage: a config names the model, the data and the objective.

  python -m experiments.train --config=configs/dpo.py --workdir=runs/dpo
  python -m experiments.train --config=configs/dpo.py --config.objective.beta=0.3 --workdir=runs/b3

Any field can be set on the command line. A stage that starts from another one (policy.init,
reward_model.init) runs that one first and keeps its result under --root for the next that needs it.
The same command again goes on where it was interrupted, and gives the same bits.

Exit codes: 0 done, 1 something given is wrong (one message says what), 75 stopped by SIGTERM or
Ctrl-C with its state saved: run the same command again to go on.
"""

import pathlib

from absl import flags

from experiments import cli, cluster
from rlhf_jax.common import processes
from rlhf_jax.common.errors import UserError
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.stages import run_stage

CONFIG = cli.define_config('The stage: a file that defines get_config(), such as configs/dpo.py.')
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'The run directory; made when it does not exist.', required=True
)
ROOT = flags.DEFINE_string(
  'root', None, 'Where stages that this one starts from are kept; default: the parent of --workdir.'
)
OVERWRITE = flags.DEFINE_bool(
  'overwrite', False, 'If --workdir holds a run of another config, delete it and start over.'
)


def main() -> int:
  config = cli.given(CONFIG)
  if not isinstance(config, ExperimentConfig):
    raise UserError(
      f'--config: expected an ExperimentConfig from get_config(), got {type(config).__name__}. '
      'A study of several stages is run by experiments.compare.'
    )
  root = ROOT.value or str(pathlib.Path(WORKDIR.value).parent)
  outcome = run_stage(config, WORKDIR.value, root=root, overwrite=OVERWRITE.value)
  if outcome.stopped:
    processes.say(f'{config.name}: stopped; run the same command again to go on.')
    return cli.STOPPED
  processes.say(f'{config.name}: done, {outcome.run.folder / "result.json"}')
  return cli.DONE


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  cli.run(cluster.joined(main, resumable=True), resumable=True)
