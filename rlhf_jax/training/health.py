"""Numerical health: what is done about numbers that are not finite, spikes, and collapse.

docs/health.md says what every monitor measures, and where its default comes from.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.metrics import Max, Metrics, Sum

Array = jax.Array

# What a state's carry holds for the guard, beside what the recipe keeps there.
NORMS, SKIPPED = 'gradient_norms', 'skipped_updates'
# Set by a recipe whose batch may be unusable although its loss is finite: 1, or 0 to learn nothing.
USABLE = 'rewards_finite'


def _demand(path: str, name: str, value: object, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise ConfigError(f'{path}.{name}', value, f'one of {choices}')


@dataclasses.dataclass(kw_only=True)
class MonitorConfig:
  """When a monitor speaks, and what happens then."""

  # Where it speaks, in the units of the monitor; 0: never.
  limit: float = 0.0
  # 'warn'; or 'stop' the run with its state saved.
  action: str = 'warn'

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if not self.limit >= 0:
      raise ConfigError(f'{path}.limit', self.limit, 'a number > 0, or 0: never')
    _demand(path, 'action', self.action, ('warn', 'stop'))


@dataclasses.dataclass(kw_only=True)
class SpikeConfig:
  """When a gradient norm is a spike, and what happens then."""

  # Times the median gradient norm, before clipping, of the last updates; 0: never.
  factor: float = 0.0
  # How many updates the median is over; before there are so many, nothing is a spike.
  window: int = 64
  # 'warn'; 'skip' the update (Chowdhery et al. 2022, PaLM, section 5.1, skip batches at spikes); or
  # 'stop' with what is needed to study the step.
  action: str = 'warn'

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if not (self.factor == 0 or self.factor > 1):
      raise ConfigError(f'{path}.factor', self.factor, 'a number > 1, or 0: never')
    if self.window < 2:
      raise ConfigError(f'{path}.window', self.window, 'an integer >= 2')
    _demand(path, 'action', self.action, ('warn', 'skip', 'stop'))


@dataclasses.dataclass(kw_only=True)
class HealthConfig:
  """What is done about numbers that are not finite, spikes of gradients, and collapsing policies.

  Monitors read what a run logs of its own samples, and compare with its first row of metrics.
  """

  # A loss, gradient or reward that is not finite: 'stop' with what experiments/replay.py needs to
  # explain it; or 'skip' the updates that it spoils, and count them.
  nonfinite: str = 'stop'
  # Skipping ends with an error after more steps in a row, or in all, than this; 0: no such limit.
  max_skipped_in_a_row: int = 5
  max_skipped: int = 100
  # Spikes of the gradient norm, for any objective.
  gradient_spike: SpikeConfig = dataclasses.field(default_factory=SpikeConfig)
  # KL to the reference, nats a response.
  kl: MonitorConfig = dataclasses.field(default_factory=MonitorConfig)
  # Entropy of the policy a token, under this share of its first.
  entropy: MonitorConfig = dataclasses.field(default_factory=lambda: MonitorConfig(limit=0.1))
  # Length of responses, longer or shorter than at first by more than this factor.
  length: MonitorConfig = dataclasses.field(default_factory=lambda: MonitorConfig(limit=2.0))
  # The share of repeated 4-grams in a response, above its first by more than this.
  repetition: MonitorConfig = dataclasses.field(default_factory=lambda: MonitorConfig(limit=0.25))
  # Standard deviation over the members of an ensemble of reward models, above its first by more
  # than this factor.
  disagreement: MonitorConfig = dataclasses.field(default_factory=lambda: MonitorConfig(limit=3.0))
  # At evaluations that know the gold reward: how many standard errors, paired by prompt, it has
  # fallen since its best while the proxy reward has risen.
  overoptimisation: MonitorConfig = dataclasses.field(
    default_factory=lambda: MonitorConfig(limit=3.0)
  )

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    _demand(path, 'nonfinite', self.nonfinite, ('stop', 'skip'))
    for name in ('max_skipped_in_a_row', 'max_skipped'):
      if getattr(self, name) < 0:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'an integer > 0, or 0: no limit')
    for field in dataclasses.fields(self):
      value: Any = getattr(self, field.name)
      if hasattr(value, 'validate'):
        value.validate(f'{path}.{field.name}')
    if 0 < self.length.limit <= 1:
      raise ConfigError(f'{path}.length.limit', self.length.limit, 'a factor > 1, or 0: never')
    if 0 < self.disagreement.limit <= 1:
      raise ConfigError(
        f'{path}.disagreement.limit', self.disagreement.limit, 'a factor > 1, or 0: never'
      )
    if self.repetition.limit >= 1:
      raise ConfigError(
        f'{path}.repetition.limit', self.repetition.limit, 'a share < 1, or 0: never'
      )
    if self.entropy.limit >= 1:
      raise ConfigError(f'{path}.entropy.limit', self.entropy.limit, 'a share < 1, or 0: never')

  @property
  def skips_spikes(self) -> bool:
    """Whether updates with a spike are left out."""
    return self.gradient_spike.factor > 0 and self.gradient_spike.action == 'skip'

  @property
  def skips(self) -> bool:
    """Whether any update may be left out."""
    return self.nonfinite == 'skip' or self.skips_spikes

  def carry(self) -> dict[str, Any]:
    """What the guard remembers from update to update, at the start; nothing where it is off."""
    carry: dict[str, Any] = {}
    if self.skips:
      carry[SKIPPED] = 0.0
    if self.gradient_spike.factor > 0:
      carry[NORMS] = np.full(self.gradient_spike.window, -1.0)  # -1: not seen yet
    return carry


class Verdict(NamedTuple):
  """Of one optimizer update.

  Attributes:
    apply: bool scalar, whether it is made; None: always.
    memory: the guard's part of the carry after it.
    metrics: what was found.
  """

  apply: Array | None
  memory: dict[str, Array]
  metrics: Metrics


def judge(
  config: HealthConfig, memory: dict[str, Array], loss: Array, norm: Array, usable: Array | None
) -> Verdict:
  """Decides, inside the jitted update, whether an optimizer update is made.

  Args:
    config: the policy.
    memory: the guard's part of the carry.
    loss: float32 scalar.
    norm: of the gradients, before clipping; it is not finite where any of them is not.
    usable: whether the batch can be learnt from, > 0; None: it can.
  """
  sound = jnp.isfinite(loss) & jnp.isfinite(norm)
  if usable is not None:
    sound &= usable > 0
  apply = sound if config.nonfinite == 'skip' else jnp.bool_(True)
  memory = dict(memory)
  metrics: Metrics = {}
  if NORMS in memory:
    history = memory[NORMS]
    usual = jnp.median(history)
    # Where most updates have no gradient at all, as with rewards that are all alike, none is usual.
    known = (history.min() >= 0) & (usual > 0)
    ratio = jnp.where(known & sound, norm / jnp.where(known, usual, 1.0), 0.0)
    spike = ratio > config.gradient_spike.factor
    if config.skips_spikes:
      apply &= ~spike
    # A spike is remembered too: a level that stays is not skipped for ever.
    memory[NORMS] = jnp.where(sound, jnp.roll(history, -1).at[-1].set(norm), history)
    metrics['gradient_spikes'] = Sum(spike.astype(jnp.int32))
    metrics['gradient_spike_ratio'] = Max(ratio)
  if not config.skips:
    return Verdict(None, memory, metrics)
  metrics['skipped_updates'] = Sum((~apply).astype(jnp.int32))
  memory[SKIPPED] = memory[SKIPPED] + ~apply
  return Verdict(apply, memory, metrics)
