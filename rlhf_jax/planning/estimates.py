"""What accelerators would hold for the passes of a stage, by the attention that they have."""

from typing import NamedTuple

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.models import attending
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.planning import arithmetic
from rlhf_jax.planning.accelerators import Accelerator
from rlhf_jax.planning.arithmetic import Activations, Rows
from rlhf_jax.planning.programs import Compiled
from rlhf_jax.planning.stage import PlannedStage
from rlhf_jax.sharding.mesh import row_devices


class Estimate(NamedTuple):
  """Bytes of one device of a named accelerator.

  Attributes:
    activations: for the update, by role of the trained decoders.
    reading: what a forward pass holds, by role of all that score for a step or an evaluation,
      whichever reads more at a time.
    attention: the implementation that computes a decoder's attention, by role.
    objection: why training would refuse the stage's attention there; None: it would not.
  """

  activations: dict[str, Activations]
  reading: dict[str, float]
  attention: dict[str, str]
  objection: str | None


def estimate(
  stage: PlannedStage,
  compiled: Compiled,
  decoders: dict[str, ModelConfig],
  rows: dict[str, Rows],
  scoring: set[str],
  accelerator: Accelerator,
) -> Estimate:
  """What a stage's passes take.

  Args:
    stage: the stage.
    compiled: its programs.
    decoders: those that gradients go through, by role.
    rows: the sequences of an update ('updated'), those of it that one device reads at a time
      ('device'), and those sampled ('sampled').
    scoring: the roles that score for a step.
    accelerator: where.
  """
  judges = {role: run.model for role, run in stage.reward_models.items()}
  models = decoders | {role: judges.get(role, stage.model) for role in compiled.frozen}
  attention, objections = {}, []
  # Whoever samples reads prompts by plain attention, but must be able to compute by the other too.
  for role, model in {'': stage.config.generation.sampling(stage.model), **models}.items():
    try:
      attention[role] = attending.resolve(
        stage.as_trained(model), accelerator.backend, accelerator.widest_head
      )
    except ConfigError as error:
      attention[role] = 'xla'
      objections.append(str(error))
  plain = {role: name == 'xla' for role, name in attention.items()}
  mesh = {name: int(size) for name, size in stage.mesh.shape.items()}
  activations = {
    role: arithmetic.activation_bytes(model, rows['device'], mesh, plain_attention=plain[role])
    for role, model in decoders.items()
  }
  reading = _reading(stage, compiled, models, rows, scoring, plain)
  del attention['']
  return Estimate(activations, reading, attention, objections[0] if objections else None)


def _reading(
  stage: PlannedStage,
  compiled: Compiled,
  models: dict[str, ModelConfig],
  rows: dict[str, Rows],
  scoring: set[str],
  plain: dict[str, bool],
) -> dict[str, float]:
  """What reading takes at the most, by role: of a step's sequences, or of an evaluation's."""
  config, mesh = stage.config, {name: int(size) for name, size in stage.mesh.shape.items()}
  online = 'generation' in compiled.programs
  read = rows['sampled'] if online else rows['updated']
  asked = config.evaluation.batch_size if compiled.evaluations else 0
  if 'records' in compiled.evaluations:
    asked *= rows['updated'].number // config.batch_size
  found: dict[str, float] = {}
  for role, model in models.items():
    step = read.number // config.accumulation  # in microbatches, as updates do
    # Evaluations answer a prompt once.
    evaluated = read._replace(number=asked, shared=1 if online else read.shared)
    for each in (read._replace(number=step if role in scoring else 0), evaluated):
      if each.number:
        share = max(each.number // row_devices(stage.mesh), 1)
        taken = arithmetic.reading_bytes(
          model,
          each._replace(number=share),
          mesh,
          plain_attention=plain[role],
          scored=role in ('policy', 'reference'),
        )
        found[role] = max(found.get(role, 0.0), taken)
  return found
