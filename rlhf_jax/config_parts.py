"""Parts of a stage's config that belong to no package: what it starts from, evaluations, logs."""

import dataclasses

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.prng import check_seed
from rlhf_jax.objectives.base import check_unread
from rlhf_jax.rollout.rewards import AGGREGATES

CHECKPOINTS = ('final', 'best')


@dataclasses.dataclass(kw_only=True)
class InitConfig:
  """Which finished stage a model comes from."""

  # A run directory; a checkpoint folder of Hugging Face's, or hf:owner/name (docs/models.md); or a
  # config file (`configs/sft.py`), whose stage is then run first unless its result is at hand.
  # None: nothing (a policy then starts from random parameters).
  init: str | None = None
  # The stage's 'final' parameters, or those of its 'best' evaluation (needs checkpoint.best_metric
  # there).
  checkpoint: str = 'final'

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if self.checkpoint not in CHECKPOINTS:
      raise ConfigError(f'{path}.checkpoint', self.checkpoint, f'one of {CHECKPOINTS}')


@dataclasses.dataclass(kw_only=True)
class RewardModelInitConfig(InitConfig):
  """Which finished reward models score responses."""

  # Further ones, runs or configs like `init`: together they are an ensemble.
  ensemble: tuple[str, ...] = ()
  # The ensemble's score: its 'mean'; its 'worst' member's; or, 'uncertainty', the mean less
  # uncertainty_coefficient times the variance over members (Coste et al. 2023). Members that
  # score tokens are aggregated token by token.
  aggregate: str = 'mean'
  uncertainty_coefficient: float = 1.0

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    super().validate(path)
    if self.aggregate not in AGGREGATES:
      raise ConfigError(f'{path}.aggregate', self.aggregate, f'one of {AGGREGATES}')
    if self.aggregate != 'mean' and not self.ensemble:
      raise ConfigError(
        f'{path}.aggregate',
        self.aggregate,
        "'mean' with a single reward model",
        f'Name the other members in {path}.ensemble.',
      )
    members = (self.init, *self.ensemble)
    if '' in members or len(set(members)) < len(members):
      raise ConfigError(
        f'{path}.ensemble',
        self.ensemble,
        f'other stages than {self.init!r} and each other',
      )
    if self.ensemble and self.init is None:
      raise ConfigError(f'{path}.init', None, "the ensemble's first member")
    if not self.uncertainty_coefficient >= 0:
      raise ConfigError(
        f'{path}.uncertainty_coefficient', self.uncertainty_coefficient, 'a number >= 0'
      )
    if self.aggregate != 'uncertainty':
      where = f'with aggregate {self.aggregate!r}'
      check_unread(self, path, ('uncertainty_coefficient',), where)


@dataclasses.dataclass(kw_only=True)
class EvaluationConfig:
  """What is asked of the model along the run."""

  # Steps between evaluations; 0: at the start and at the end only.
  every: int = 0
  # Held-out prompts to answer (one sampled response each), and held-out records to score; all if
  # there are fewer. 0 asks nothing of the kind.
  prompts: int = 128
  records: int = 512
  # Rows a forward pass.
  batch_size: int = 64
  # Seed of the sampled responses: equal seeds give equal random numbers, whatever the run's seed.
  seed: int = 0

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    for name in ('every', 'prompts', 'records'):
      if getattr(self, name) < 0:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'an integer >= 0')
    if self.batch_size < 1:
      raise ConfigError(f'{path}.batch_size', self.batch_size, 'an integer >= 1')
    check_seed(f'{path}.seed', self.seed)


@dataclasses.dataclass(kw_only=True)
class LogConfig:
  """What is written along the run."""

  # Steps merged into one row of metrics and one line of progress.
  every: int = 10
  # TensorBoard files beside the JSON lines.
  tensorboard: bool = True

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if self.every < 1:
      raise ConfigError(f'{path}.every', self.every, 'an integer >= 1')
