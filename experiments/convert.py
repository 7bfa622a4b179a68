r"""Writes a finished run, or a checkpoint folder, as a folder that transformers loads.

  python -m experiments.convert --source=runs/dpo --target=folders/dpo --dtype=bfloat16
  python -m experiments.convert --source=runs/rm --target=folders/rm
  python -m experiments.convert --source=runs/ppo --role=value --target=folders/ppo_value
  python -m experiments.convert --source=hf:owner/name --target=folders/name --shard_gb=2
  python -m experiments.convert --source=runs/dpo_lora --target=folders/adapter --adapter

A run's policy becomes an AutoModelForCausalLM; a reward model, or the value function of a policy,
an AutoModelForSequenceClassification with one label (docs/models.md says what becomes of its bias).
A run that trained low-rank matrices becomes a whole model, or with --adapter a folder of PEFT (a
reward model's has its score too) for the checkpoint folder it started from, with the run's
tokenizer, chat template and stop tokens; --base names another place of that, or the folder that its
parent was written to. A folder of PEFT as --source is merged into its model.
A checkpoint folder, or one of the hub, is written again in another type or other shards; tensors
keep their bits where the type is kept. The target must be empty or absent, and appears when all is
written.

Exit codes: 0 done, 1 something given is wrong (one message says what), 130 ended by Ctrl-C: what
was written is deleted.
"""

import pathlib
from typing import Any

import jax
from absl import flags

from experiments import cli
from rlhf_jax.common.errors import RunError, UserError
from rlhf_jax.config_parts import CHECKPOINTS
from rlhf_jax.hf_folder import HfFolder, PeftFolder, assets_of, open_source
from rlhf_jax.models import hf_export, hf_hub, hf_peft
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf_files import DTYPES, SHARD_BYTES
from rlhf_jax.models.roles import abstract_reward_model
from rlhf_jax.objectives import demands_of, objective_of
from rlhf_jax.recipes.parts import abstract_decoder, abstract_head
from rlhf_jax.runs import Run
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh

SOURCE = flags.DEFINE_string(
  'source',
  None,
  'The directory of a finished run, a checkpoint folder, or hf:owner/name[@revision].',
  required=True,
)
TARGET = flags.DEFINE_string('target', None, 'The folder to write.', required=True)
ROLE = flags.DEFINE_enum(
  'role',
  None,
  ('policy', 'reward_model', 'value'),
  "Which model of a run; 'value' is a policy's value function. Default: what the run trained.",
)
CHECKPOINT = flags.DEFINE_enum('checkpoint', 'final', CHECKPOINTS, 'Which parameters of a run.')
DTYPE = flags.DEFINE_enum(
  'dtype',
  None,
  tuple(DTYPES.values()),
  "In which numbers are stored. Default: a run's in float32, a folder's as they are.",
)
ADAPTER = flags.DEFINE_bool(
  'adapter', False, "Write the low-rank matrices of a run, and a reward model's score, for PEFT."
)
BASE = flags.DEFINE_string(
  'base',
  None,
  'With --adapter: the checkpoint folder, or name of the hub, that PEFT is to put them on. '
  'Default: the one the run started from.',
)
SHARD_GB = flags.DEFINE_float(
  'shard_gb', SHARD_BYTES / 10**9, 'The largest file, in units of 10^9 bytes.', 1e-6
)


def host_mesh() -> jax.sharding.Mesh:
  """The host's memory, where a model fits that was trained on many accelerators."""
  try:
    devices = jax.devices('cpu')
  except RuntimeError:  # JAX_PLATFORMS names the accelerator alone
    devices = jax.devices()
  return make_mesh(MeshConfig(data=1), devices[:1])


def main() -> int:
  source, target = open_source(SOURCE.value), pathlib.Path(TARGET.value)
  shard_bytes = int(SHARD_GB.value * 10**9)
  if BASE.value is not None and not ADAPTER.value:
    raise UserError('--base: it is read with --adapter only.')
  if isinstance(source, HfFolder):
    for flag in (ROLE, CHECKPOINT, ADAPTER):
      if flag.value != flag.default:
        raise UserError(
          f'--{flag.name}={flag.value}: {SOURCE.value} is a checkpoint folder, which has one '
          'model. Leave it out.'
        )
    if isinstance(source, PeftFolder):
      merge(source, target, shard_bytes)
    else:
      hf_export.convert(source.opened, target, dtype=DTYPE.value, shard_bytes=shard_bytes)
  elif ADAPTER.value:
    export_adapter(source, target)
  else:
    export(source, target, shard_bytes)
  print(f'{SOURCE.value} -> {target}')
  return cli.DONE


def export(run: Run, target: pathlib.Path, shard_bytes: int) -> None:
  """Writes one model of a finished run."""
  model = model_of(run)
  objective, demands = objective_of(run.config.objective), demands_of(run.config.objective)
  role = objective.trains if ROLE.value is None else ROLE.value
  if (role == 'reward_model') != (objective.trains == 'reward_model'):
    raise UserError(f'--role={role}: {run.folder} trained a {objective.trains.replace("_", " ")}.')
  settings: dict[str, Any] = dict(dtype=DTYPE.value or 'float32', shard_bytes=shard_bytes)
  mesh = host_mesh()
  if role == 'policy':
    params = run.restore_role('policy', abstract_decoder(model, mesh), CHECKPOINT.value)
    hf_export.export_policy(target, model, params, assets_of(run), **settings)
  elif role == 'reward_model':
    abstract = abstract_reward_model(model, mesh)
    params = run.restore_role('reward_model', abstract, CHECKPOINT.value)
    hf_export.export_scorer(target, model, params, assets_of(run), **settings)
  else:
    if demands.value is None:
      raise UserError(f'--role=value: {run.folder} ({objective.name}) has no value function.')
    origin = run.parents()['reward_model'] if demands.value == 'reward_model' else run
    params = value_function(run, origin.model, demands.value, mesh)
    hf_export.export_scorer(target, origin.model, params, assets_of(origin), **settings)


def model_of(run: Run) -> ModelConfig:
  """The decoder of a finished run; raises RunError for what transformers has no place for."""
  run.require_result()
  model = run.model
  if not isinstance(model, ModelConfig):
    raise RunError(f'{run.folder}: a policy for control, which transformers has no place for.')
  if demands_of(run.config.objective).q is not None:
    raise RunError(
      f'{run.folder}: what it learnt is the tilt of its Q heads, which transformers has no place '
      'for.'
    )
  if objective_of(run.config.objective).by_token:
    raise RunError(
      f'{run.folder}: a process reward model scores every token; the classifiers of transformers '
      'score whole texts.'
    )
  return model


def merge(source: PeftFolder, target: pathlib.Path, shard_bytes: int) -> None:
  """Writes an adapter and its base as one model."""
  mesh, model, assets = host_mesh(), source.model, assets_of(source)
  settings: dict[str, Any] = dict(dtype=DTYPE.value or source.stored_dtype, shard_bytes=shard_bytes)
  if source.opened.scores:
    params = source.restore_role('reward_model', abstract_reward_model(model, mesh))
    hf_export.export_scorer(target, model, params, assets, **settings)
  else:
    params = source.restore_role('policy', abstract_decoder(model, mesh))
    hf_export.export_policy(target, model, params, assets, **settings)


def export_adapter(run: Run, target: pathlib.Path) -> None:
  """Writes what a run trained of its policy, or of its reward model."""
  model, config = model_of(run), run.config
  if config.adapter.method != 'lora':
    raise UserError(
      f'--adapter: {run.folder} trained no low-rank matrices (adapter.method='
      f'{config.adapter.method!r}). Leave it out.'
    )
  trained = objective_of(config.objective).trains
  if ROLE.value not in (None, trained) or DTYPE.value is not None:
    raise UserError(
      f'--adapter: it writes what {run.folder} trained, a {trained.replace("_", " ")}, in float32. '
      'Leave --role and --dtype out.'
    )
  parent = run.parents()['policy']
  base = BASE.value
  if base is None:
    if not isinstance(parent, HfFolder) or isinstance(parent, PeftFolder):
      raise UserError(
        f'--adapter: {run.folder} started from {parent.source}, which PEFT cannot take for a base. '
        'Write that as a folder first (--source), and name it with --base.'
      )
    if parent.opened.pictures:
      raise UserError(
        f'--adapter: {run.folder} started from the text part of {parent.folder}, which PEFT finds '
        'there under other names. Write that part as a folder first (--source), and name it with '
        '--base.'
      )
    base = hf_hub.name_of(parent.folder) or str(parent.folder)
  scores = trained == 'reward_model'
  family = hf_export.family_of(target, model, assets_of(run), scores=scores)
  params = run.restore_adapter(host_mesh(), CHECKPOINT.value)
  score = hf_export.score_of(params) if scores else None
  matrices = params['trunk'] if scores else params
  with hf_export.new_folder(target) as folder:
    hf_peft.export_adapter(folder, family, model, config.adapter, matrices, base=base, score=score)
    # Whole, not as files of the start, which may need its config.json to be understood.
    run.tokenizer().save(folder)


def value_function(run: Run, model: ModelConfig, kind: str, mesh: jax.sharding.Mesh) -> Any:
  """A value function in the shape of a reward model that needs no normalising."""
  trunk_role = 'policy' if kind == 'shared' else 'value_trunk'
  trunk = run.restore_role(trunk_role, abstract_decoder(model, mesh), CHECKPOINT.value)
  head = run.restore_role('value_head', abstract_head(model, mesh), CHECKPOINT.value)
  return {'trunk': trunk, 'head': head, 'normalizer': {'gain': 1.0, 'bias': 0.0}}


if __name__ == '__main__':
  cli.run(main)
