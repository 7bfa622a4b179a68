"""Runs one stage, after the stages it starts from: their results are cached and shared."""

import contextlib
import dataclasses
import errno
import fcntl
import pathlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from rlhf_jax.common import determinism, processes, trees
from rlhf_jax.common.errors import ConfigError, RunError
from rlhf_jax.config import ExperimentConfig, load_config
from rlhf_jax.config_values import to_dict
from rlhf_jax.data.config import CONTROL, TRAINED_TOKENIZERS
from rlhf_jax.data.segments import ControlFeedback
from rlhf_jax.data.tokenizers import load as load_tokenizer
from rlhf_jax.feedback.dataset import Feedback
from rlhf_jax.hf_folder import is_source, open_source
from rlhf_jax.objectives import objective_of
from rlhf_jax.origins import path_of
from rlhf_jax.provenance import environment_record, git_revision
from rlhf_jax.reading import load_data
from rlhf_jax.recipes import Built, build
from rlhf_jax.recipes.parents import check_best, check_role
from rlhf_jax.recipes.parts import chat_template, check_devices, check_records
from rlhf_jax.recipes.rewards import check_judges, reward_fingerprints
from rlhf_jax.runs import Run, fingerprint, write_json
from rlhf_jax.training.checkpoints import Checkpoints
from rlhf_jax.training.loop import LoopConfig, Outcome, train
from rlhf_jax.training.writers import read_rows

# What file systems say that know no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# A network file system may show a new file to other machines only after a while.
_SEEN_SECONDS = 60


class Stage(NamedTuple):
  """A stage with everything it depends on settled.

  Attributes:
    config: as its file and the flags give it.
    parents: the finished runs it starts from, by role.
    feedback: its data.
    identity: JSON values of all its result depends on.
  """

  config: ExperimentConfig
  parents: dict[str, Run]
  feedback: Feedback | ControlFeedback
  identity: dict[str, Any]


class StageOutcome(NamedTuple):
  """The run, and whether a signal stopped it before its end."""

  run: Run
  stopped: bool


class StoppedError(BaseException):  # no `except Exception` may swallow it
  """A stage that another one needs was stopped on request; its state is saved."""


def run_stage(
  config: ExperimentConfig,
  workdir: str | pathlib.Path,
  *,
  root: str | pathlib.Path,
  overwrite: bool = False,
) -> StageOutcome:
  """Runs a stage in `workdir`, or goes on with it, or finds it finished.

  Args:
    config: a config as its file and the flags give it; it is not changed.
    workdir: the run directory.
    root: where stages it depends on are cached, under `stages/`.
    overwrite: start over when the directory belongs to another config.

  Raises:
    UserError: something in the config, the data or a run directory cannot work.
    StoppedError: a stage it depends on was stopped by a signal.
  """
  stage = resolve(config, root)
  run = Run(workdir)
  with locked(run.folder):
    if check(run, stage.identity, overwrite=overwrite):
      processes.say(f'{config.name}: finished already, in {run.folder}')
      return StageOutcome(run, stopped=False)
    return _execute(stage, run, root)


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
  """Keeps other runs of this machine out of a run directory; waits until it is free.

  Process 0 holds the lock for all processes of this run.
  """
  if not processes.is_main():
    processes.barrier(f'lock of {folder}')
    yield
    return
  folder.parent.mkdir(parents=True, exist_ok=True)
  with (folder.parent / f'.{folder.name}.lock').open('w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f'{folder}: another process works there; waiting for it', flush=True)
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
      print(
        f'{folder}: no locks ({error.strerror}): start nothing else there meanwhile', flush=True
      )
    processes.barrier(f'lock of {folder}')
    yield


def check(run: Run, identity: dict[str, Any], *, overwrite: bool) -> bool:
  """Whether a run is finished, once its directory has passed `Run.check`.

  Raises RunError as that does, and where a process of several is about another stage.
  """
  processes.check_same(f'{run.folder}: config, data or parents', fingerprint(identity))

  def look() -> bool:
    run.check(identity, overwrite=overwrite)
    return run.finished(identity)

  return processes.on_main(look)


def resolve(
  config: ExperimentConfig, root: str | pathlib.Path, chain: tuple[str, ...] = ()
) -> Stage:
  """Validates a config, runs the stages it depends on where needed, and loads its data.

  `chain` holds the config files that led here, so that a circle of them is refused.
  """
  if config.deterministic:
    determinism.require()
  feedback, rewards = _check_chain(config, root, chain)
  parents = {
    role: _parent(config, role, init, root, chain) for role, (init, _) in config.inits().items()
  }
  check_judges(config, parents)
  return Stage(config, parents, feedback, _identity(config, parents, feedback, rewards))


def check_alone(
  config: ExperimentConfig, root: str | pathlib.Path
) -> tuple[Feedback | ControlFeedback, dict[str, str]]:
  """A stage's data, and the fingerprints of its reward functions.

  Raises UserError for what can be known to be wrong without the stages that it starts from.
  """
  config.validate()
  feedback = load_data(config.data, root)
  check_devices(config)
  check_records(config, feedback)
  objective = objective_of(config.objective)
  if objective.trains == 'policy' and config.evaluation.prompts and isinstance(feedback, Feedback):
    feedback.require('held_out', 'prompts')
  rewards = reward_fingerprints(config.rollout) if objective.data == 'prompts' else {}
  return feedback, rewards


def _check_chain(
  config: ExperimentConfig, root: str | pathlib.Path, chain: tuple[str, ...]
) -> tuple[Feedback | ControlFeedback, dict[str, str]]:
  """`check_alone` of a stage, and of all that it starts from before any of them takes its time."""
  found = check_alone(config, root)
  for role, (init, checkpoint) in config.inits().items():
    if is_source(init):
      if (run := open_source(init)).result is not None:
        check_role(role, str(run.source), run.config.objective)
        run.params_identity(checkpoint)  # which says so if no parameters can be read
      continue
    needed = _needed_stage(config, role, init, chain)
    try:
      _check_chain(needed, root, (*chain, init))
    except ConfigError as error:
      raise ConfigError(
        path_of(role), init, 'a stage that can run on behalf of this one', f'Of that one: {error}'
      ) from error
  return found


def _identity(
  config: ExperimentConfig,
  parents: dict[str, Run],
  feedback: Feedback | ControlFeedback,
  rewards: dict[str, str],
) -> dict[str, Any]:
  """All a result depends on; a parent counts by its parameters, wherever they lie."""
  checkpoints = {role: init.checkpoint for role, init in config.inits().items()}
  sources = {role: run.params_identity(checkpoints[role]) for role, run in parents.items()}
  values = to_dict(config.with_inits(sources))
  # On another mesh, or server, a run goes on, or is found finished: what it is does not change.
  del values['mesh'], values['rollout']['server']
  tokenizer = None
  own = 'policy' not in parents and config.data.source != CONTROL
  if own and config.data.tokenizer not in TRAINED_TOKENIZERS:
    tokenizer = load_tokenizer(pathlib.Path(config.data.tokenizer)).identity
  template = None
  if config.data.chat_template:
    template = fingerprint(chat_template(config.data))
  return {
    'config': values,
    'data': feedback.fingerprint,
    'tokenizer': tokenizer,
    'chat_template': template,
    'rewards': rewards,
  }


def _parent(
  config: ExperimentConfig,
  role: str,
  init: str,
  root: str | pathlib.Path,
  chain: tuple[str, ...],
) -> Run:
  """What is behind an `init`: a finished run, a checkpoint folder, the stage of a config file."""
  field = path_of(role)
  if is_source(init):
    run = open_source(init)
    if run.result is None:
      raise ConfigError(
        field,
        init,
        'the directory of a finished run',
        'It has no result.json: run its command again to finish it.',
      )
    return run
  needed = _needed_stage(config, role, init, chain)
  stage = resolve(needed, root, (*chain, init))
  folder = pathlib.Path(root) / 'stages' / f'{needed.name}-{fingerprint(stage.identity)[:12]}'
  run = Run(folder)
  with locked(folder):
    if not check(run, stage.identity, overwrite=False):
      processes.say(f'{config.name}: first its {role.replace("_", " ")}, {init}, in {folder}')
      if _execute(stage, run, root).stopped:
        raise StoppedError
      return run
  if run.revision != git_revision():
    # Its fingerprint covers config, data and parents; whether the code between matters, only the
    # user knows.
    processes.say(f'{config.name}: {folder} was made by revision {run.revision} of the code')
  return run


def _needed_stage(
  config: ExperimentConfig, role: str, init: str, chain: tuple[str, ...]
) -> ExperimentConfig:
  """The stage of a config file that `config` starts from, on the devices and the data of that."""
  field = path_of(role)
  if not pathlib.Path(init.partition(':')[0]).is_file():
    raise ConfigError(
      field,
      init,
      'a run directory, a checkpoint folder (hf:owner/name of the hub) or a config file',
      'There is none at that path.',
    )
  if init in chain:
    raise ConfigError(
      field,
      init,
      'a stage that does not start from this one',
      f'{" -> ".join(chain)} is a circle.',
    )
  needed = load_config(init)
  if not isinstance(needed, ExperimentConfig):
    raise ConfigError(field, init, f'the config of one stage, not a {type(needed).__name__}')
  check_role(role, init, needed.objective)
  check_best(role, init, config.inits()[role].checkpoint, needed)
  # It works on behalf of this stage: on the same devices, on the same data (or what is held out
  # here might be trained on there); what it makes of them is its own affair.
  needed.mesh = config.mesh
  if needed.data.source != config.data.source:
    raise ConfigError(
      field,
      init,
      f'a config on the same source, {config.data.source!r}, not {needed.data.source!r}',
      'Name a run that was trained on it, or another config.',
    )
  own = {name: getattr(needed.data, name) for name in ('responses', 'convert')}
  needed.data = dataclasses.replace(config.data, **own)
  return needed


def _execute(stage: Stage, run: Run, root: str | pathlib.Path) -> StageOutcome:
  config = stage.config
  built = build(config, stage.parents, stage.feedback, pathlib.Path(root), run.folder)
  processes.on_main(lambda: _begin(stage, run, built))
  _check_seen(run)
  checkpoints = Checkpoints(run.folder / 'checkpoints', config.checkpoint)
  loop = LoopConfig(
    steps=config.steps,
    log_every=config.log.every,
    evaluate_every=config.evaluation.every,
    checkpoint_every=config.checkpoint.every,
    checkpoint_evaluations=bool(config.checkpoint.best_metric),
    tensorboard=config.log.tensorboard,
    health=config.health,
    samples=objective_of(config.objective).data == 'prompts',
  )
  try:
    with jax.set_mesh(built.mesh):
      outcome = train(config.name, built.recipe, loop, run.folder, checkpoints)
  finally:
    checkpoints.close()
  if outcome.stopped:
    return StageOutcome(run, stopped=True)
  params_sha256 = trees.sha256(outcome.state.by_role)
  processes.on_main(lambda: _end(stage, run, built, outcome, checkpoints.best_step, params_sha256))
  return StageOutcome(run, stopped=False)


def _begin(stage: Stage, run: Run, built: Built) -> None:
  """Makes the directory the run's own, and writes what is known beforehand."""
  config = stage.config
  places = {'mesh': to_dict(config.mesh), 'server': to_dict(config.rollout.server)}
  run.claim(stage.identity, stage.parents, places)
  record = {
    **environment_record(),
    'mesh': dict(built.mesh.shape),
    'data_fingerprint': stage.feedback.fingerprint,
    'quarantined_records': stage.feedback.quarantined,
    'damaged_sources': list(stage.feedback.damage),
    'training_rows': built.recipe.rows,
    'seeds': {'run': config.seed, 'evaluation': config.evaluation.seed},
  }
  run.add_record(record)
  if built.tokenizer is not None:
    built.tokenizer.save(run.folder / 'tokenizer')
  if 'policy' in stage.parents:
    stage.parents['policy'].save_assets(run.folder)


def _check_seen(run: Run) -> None:
  """Raises RunError in a process that does not see what process 0 has begun."""
  deadline = time.monotonic() + _SEEN_SECONDS
  while not (run.folder / 'config.json').exists():
    if time.monotonic() > deadline:
      raise RunError(
        f'{run.folder}: process {jax.process_index()} does not see the directory that process 0 '
        'has made. Name a --workdir and a --root on a file system that all processes share.'
      )
    time.sleep(0.5)


def _end(
  stage: Stage,
  run: Run,
  built: Built,
  outcome: Outcome,
  best_step: int | None,
  params_sha256: str,
) -> None:
  """Writes the result."""
  evaluation = _last_row(run.folder / 'evaluations.jsonl')
  write_json(
    run.folder / 'result.json',
    {
      'step': stage.config.steps,
      'best_step': best_step,
      'params_sha256': params_sha256,
      'model': to_dict(built.model),
      'tokens': outcome.tokens,
      'seconds': outcome.seconds,
      'skipped_updates': outcome.skipped_updates,
      'metrics': _last_row(run.folder / 'metrics.jsonl'),
      'evaluation': evaluation,
      **{name: evaluation.get(name) for name in built.recipe.headline if evaluation is not None},
    },
  )


def _last_row(path: pathlib.Path) -> dict[str, Any] | None:
  rows = read_rows(path)
  return rows[-1] if rows else None
