"""Run directories: what is in them, whom they belong to, and how finished ones are read.

config.json     the resolved config, what it depends on, and the mesh
record.json     package versions, git revision, devices, data fingerprint, seeds, command
tokenizer/      the tokenizer the run's token ids mean
checkpoints/    one folder a step; damaged/ holds those that could not be read
metrics.jsonl   training metrics; evaluations.jsonl and evaluations/ hold answers
health.jsonl    what monitors found; nonfinite/ holds steps whose numbers were not finite
result.json     written last: final metrics and the SHA-256 of the final parameters
hf/             what the checkpoint folder it started from says of itself, for its export
"""

import hashlib
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from rlhf_jax.common import files, processes
from rlhf_jax.common.errors import RunError
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.config_values import KINDS, canonical_json, differences, from_dict
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.data.tokenizers import load as load_tokenizer
from rlhf_jax.evaluation import stored
from rlhf_jax.models import adapters, attending, roles
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.objectives import demands_of, objective_of
from rlhf_jax.provenance import BITS_DEPEND_ON
from rlhf_jax.training.checkpoints import Checkpoints

# Of a run that goes back to a checkpoint folder: its config.json, tokenizer files and so on.
ASSETS = 'hf'


def write_json(path: pathlib.Path, values: Any) -> None:
  """Writes a JSON file that is either whole or absent."""
  files.write_text(path, canonical_json(values) + '\n')


_MADE_AGAIN = 'Delete it, and run the command of its directory again: that writes it anew.'


def _read_json(path: pathlib.Path, remedy: str) -> Any:
  """The content of a JSON file; None where there is none. Raises RunError for a damaged one."""
  if not path.is_file():
    return None
  try:
    return json.loads(path.read_bytes())
  except ValueError as error:
    raise RunError(f'{path}: damaged ({error}). {remedy}') from error


def fingerprint(values: Any) -> str:
  """SHA-256 of the canonical JSON of some values."""
  return hashlib.sha256(canonical_json(values).encode()).hexdigest()


class Run:
  """A run directory that a stage of this or an earlier process wrote."""

  def __init__(self, folder: str | pathlib.Path):
    self.folder = pathlib.Path(folder)

  @property
  def source(self) -> pathlib.Path:
    """The folder that `open_source` makes this of again."""
    return self.folder

  @property
  def result(self) -> dict[str, Any] | None:
    """The content of result.json; None while the run is not finished."""
    return _read_json(self.folder / 'result.json', _MADE_AGAIN)

  def finished(self, identity: dict[str, Any]) -> bool:
    """Whether the directory holds the result of this very config."""
    return self.result is not None and self._origin()['identity'] == identity

  def _origin(self) -> dict[str, Any]:
    """The content of config.json: 'identity' and 'parents'."""
    origin = _read_json(
      self.folder / 'config.json', 'Put it back, or run the stage in another folder.'
    )
    if origin is None:
      raise RunError(f'{self.folder}: not a run directory (it has no config.json).')
    return origin

  @property
  def config(self) -> ExperimentConfig:
    """The config the run was made with; its `init` fields name the parents' directories."""
    origin = self._origin()
    values = {**origin['identity']['config'], 'mesh': origin['mesh']}
    if 'server' in origin:  # older runs knew of none
      values['rollout'] = {**values['rollout'], 'server': origin['server']}
    return from_dict(ExperimentConfig, values).with_inits(origin['parents'])

  @property
  def params_sha256(self) -> str:
    """Of the final parameters."""
    return self.require_result()['params_sha256']

  @property
  def data_fingerprint(self) -> str:
    """Of the records it learnt from and was evaluated on."""
    return self._origin()['identity']['data']

  @property
  def reward_fingerprints(self) -> dict[str, str]:
    """SHA-256 of the files of the functions that paid it, by name."""
    return self._origin()['identity']['rewards']

  @property
  def record(self) -> dict[str, Any]:
    """The content of record.json: what made it; empty where there is none."""
    record = _read_json(self.folder / 'record.json', _MADE_AGAIN)
    return {} if record is None else record

  @property
  def revision(self) -> str | None:
    """The revision of the code that made it, where that was known."""
    return self.record.get('git_revision')

  def answers(self, step: int) -> dict[str, np.ndarray]:
    """What the evaluation at a step measured and sampled, prompt by prompt.

    Raises RunError where that is missing or damaged, or the number, maybe from a file, is none.
    """
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
      raise RunError(f'{self.folder}: evaluations.jsonl: step {step!r:.60} is no number.')
    return stored.read(self.folder / 'evaluations' / f'{step:08}.npz')

  def params_identity(self, checkpoint: str) -> str:
    """What tells the 'final' or the 'best' parameters from all others."""
    if checkpoint == 'final':
      identity = f'sha256:{self.params_sha256}'
      config = self.config
      if config.adapter.method == 'none':
        return identity
      parent = self.parents()['policy']
      self._require(parent)
      return f'{identity} on {parent.params_identity(config.policy.checkpoint)}'
    return f'{fingerprint(self._origin()["identity"])} at step {self.step(checkpoint)}'

  def parents(self) -> dict[str, 'Run']:
    """The runs it started from, by role."""
    from rlhf_jax.hf_folder import open_source  # which has checkpoint folders stand for runs

    return {role: open_source(folder) for role, folder in self._origin()['parents'].items()}

  @property
  def model(self) -> Any:
    """The decoder of the run, with its vocabulary size filled in, or its policy for control."""
    values = self.require_result()['model']
    model = from_dict(KINDS.get(values.get('kind'), ModelConfig), values)
    return attending.portable(model) if isinstance(model, ModelConfig) else model

  def tokenizer(self) -> Tokenizer:
    """The tokenizer of the run."""
    return load_tokenizer(self.folder / 'tokenizer')

  def save_assets(self, target: pathlib.Path) -> None:
    """Hands on what it keeps of a checkpoint folder to a run that starts from it."""
    assets = self.folder / ASSETS
    if assets.is_dir():
      # We make none; a run directory from elsewhere must not hand on files of this machine.
      links = [path for path in (assets, *assets.rglob('*')) if path.is_symlink()]
      if links:
        raise RunError(f'{links[0]}: a symbolic link, where a run keeps files. Put the file there.')
      shutil.copytree(assets, target / ASSETS, dirs_exist_ok=True)

  def require_result(self) -> dict[str, Any]:
    """The content of result.json; raises RunError while the run is not finished."""
    result = self.result
    if result is None:
      self._origin()  # a directory that is no run at all has its own message
      raise RunError(
        f'{self.folder}: the run is not finished (it has no result.json). Run its '
        'command again to go on.'
      )
    return result

  def step(self, checkpoint: str) -> int:
    """The step of the 'final' or the 'best' parameters."""
    result = self.require_result()
    if checkpoint == 'best' and result['best_step'] is None:
      raise RunError(
        f"{self.folder}: no 'best' checkpoint was kept; that stage needs checkpoint.best_metric."
      )
    return result['best_step'] if checkpoint == 'best' else result['step']

  def restore_role(self, role: str, abstract: Any, checkpoint: str = 'final') -> Any:
    """Parameters of one role ('policy', a target's too), in the shardings of `abstract`.

    A decoder that was trained in part is put together with what it started from, which is read from
    the parent's directory.
    """
    if self.config.adapter.method == 'none' or role not in adapters.DECODERS:
      return self._restore(role, abstract, checkpoint)
    name = adapters.DECODERS[role]
    whole = abstract if name is None else abstract[name]
    mesh = jax.tree.leaves(whole)[0].sharding.mesh
    base = self._base(role, whole)
    part = adapters.abstract(self.config.adapter, self._model_of(role), mesh)
    trained = self._restore(role, part if name is None else {**abstract, name: part}, checkpoint)
    if name is None:
      return self._merged(role, whole, base, trained)
    return {**trained, name: self._merged(role, whole, base, trained[name])}

  def restore_adapter(self, mesh: jax.sharding.Mesh, checkpoint: str = 'final') -> Any:
    """What was trained of a decoder in part: the tree of `adapters.init`.

    Of a policy it is all; of a reward model, with that tree for its trunk, head and normaliser too.
    """
    model = self.model
    part = adapters.abstract(self.config.adapter, model, mesh)
    if objective_of(self.config.objective).trains == 'policy':
      return self._restore('policy', part, checkpoint)
    whole = roles.abstract_reward_model(model, mesh)
    return self._restore('reward_model', {**whole, 'trunk': part}, checkpoint)

  def _restore(self, role: str, abstract: Any, checkpoint: str) -> Any:
    """What this run's own checkpoint has of a role."""
    step = self.step(checkpoint)
    checkpoints = Checkpoints(self.folder / 'checkpoints', self.config.checkpoint)
    try:
      return checkpoints.restore_role(role, abstract, step)
    finally:
      checkpoints.close()

  def _value_parent(self, role: str) -> 'Run | None':
    """The reward model that a value trunk started from; None for other roles and starts."""
    copied = demands_of(self.config.objective).value == 'reward_model'
    return self.parents()['reward_model'] if role == 'value_trunk' and copied else None

  def _require(self, parent: 'Run') -> None:
    """Raises RunError where the rest of a decoder that was trained in part is gone."""
    if not parent.source.is_dir():
      raise RunError(
        f'{self.folder}: it holds only what it trained of its decoder; the rest is in '
        f'{parent.source}, which is not there any more. Put it back.'
      )

  def _model_of(self, role: str) -> ModelConfig:
    parent = self._value_parent(role)
    return self.model if parent is None else parent.model

  def _base(self, role: str, abstract: Any) -> Any:
    """What a decoder that was trained in part started from, whole."""
    config, judge = self.config, self._value_parent(role)
    parent = self.parents()['policy'] if judge is None else judge
    self._require(parent)
    field = 'policy' if judge is None else 'reward_model'
    recorded = self._origin()['identity']['config'][field]['init']
    found = parent.params_identity(getattr(config, field).checkpoint)
    if found != recorded:
      raise RunError(
        f'{self.folder}: it holds only what it trained of its decoder; the rest was in '
        f'{parent.source}, where other parameters lie now ({found}, not {recorded}). Put them back.'
      )
    if judge is None:
      return parent.restore_role('policy', abstract, config.policy.checkpoint)
    whole = roles.abstract_reward_model(judge.model, jax.tree.leaves(abstract)[0].sharding.mesh)
    return judge.restore_role('reward_model', whole, config.reward_model.checkpoint)['trunk']

  def _merged(self, role: str, abstract: Any, base: Any, trained: Any) -> Any:
    """A whole decoder from what it started from, which is used up, and what was trained of it."""
    adapter, model = self.config.adapter, self._model_of(role)
    base = adapters.base_of(adapter, base)
    merge = jax.jit(
      lambda base, trained: adapters.merge(
        model, adapters.join(adapters.frozen_of(adapter, model, base), trained)
      ),
      out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
      donate_argnums=0 if adapter.method == 'lora' else (),
    )
    return merge(base, trained)

  @property
  def _learnt(self) -> bool:
    """Whether there is something of a training step: metrics, a checkpoint, a batch that failed."""
    metrics = self.folder / 'metrics.jsonl'
    return (metrics.exists() and metrics.stat().st_size > 0) or any(
      path for name in ('checkpoints/[0-9]*', 'nonfinite/*') for path in self.folder.glob(name)
    )

  def check(self, identity: dict[str, Any], *, overwrite: bool) -> None:
    """Finds that the directory is free, this run's own, or may be deleted.

    A run that ended before it had learnt anything, say by a mistake in its config, may be.

    Args:
      identity: JSON values of all the run's result depends on.
      overwrite: whether another run's content may be deleted.

    Raises:
      RunError: the directory belongs to another config (the differing fields are named), or holds
        something that is no run.
    """
    if self.folder.exists() and not self.folder.is_dir():
      raise RunError(f'{self.folder}: not a folder. Name another --workdir.')
    if not self.folder.exists() or not any(self.folder.iterdir()):
      return
    if not (self.folder / 'config.json').exists():
      raise RunError(
        f'{self.folder}: not empty, and not a run directory (it has no config.json). '
        'Name another --workdir.'
      )
    found = self._origin()['identity']
    if found != identity and not overwrite and self._learnt:
      lines = '\n  '.join(differences(found, identity))
      records = ''
      if found.get('data') != identity.get('data'):
        records = "'data' stands for the records: those of the source are not what they were.\n"
      raise RunError(
        f'{self.folder}: belongs to a run with another config; it differs (there -> here) in\n'
        f'  {lines}\n{records}'
        'Name another --workdir, or pass --overwrite to delete it and start over.'
      )

  def claim(
    self, identity: dict[str, Any], parents: dict[str, 'Run'], places: dict[str, Any]
  ) -> None:
    """Makes a directory that passed `check` this run's own; another run's content is deleted.

    The places, 'mesh' and 'server', are where it works, which is no part of what it is.
    """
    if (self.folder / 'config.json').exists() and self._origin()['identity'] != identity:
      processes.say(f'{self.folder}: the run of another config that it held is deleted')
      # Renamed first: an interrupted deletion must not leave half a run under its name. A link to
      # the directory stays.
      folder = self.folder.resolve()
      doomed = folder.with_name(f'.{folder.name}.deleted')
      shutil.rmtree(doomed, ignore_errors=True)
      folder.rename(doomed)
      shutil.rmtree(doomed)
      folder.mkdir()
    self.folder.mkdir(parents=True, exist_ok=True)
    folders = {role: str(run.source.absolute()) for role, run in parents.items()}
    origin = {'identity': identity, 'parents': folders, **places}
    write_json(self.folder / 'config.json', origin)

  def add_record(self, record: dict[str, Any]) -> None:
    """Writes record.json; what it said before, if a run goes on elsewhere, stays in 'earlier'."""
    path = self.folder / 'record.json'
    earlier = []
    if before := self.record:
      earlier = before.pop('earlier', [])
      if changed := sorted(name for name in record if record[name] != before.get(name)):
        earlier.append(before)
        others = [name for name in changed if name in BITS_DEPEND_ON]
        if self._learnt and others:
          processes.say(
            f'{self.folder}: goes on with another {", ".join(others)}; its bits may differ from '
            'those of an undisturbed run'
          )
    write_json(path, {**record, 'earlier': earlier})
