"""A study: one start, one set of preferences, one reward model; objectives x seeds compared."""

import dataclasses

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.config import ExperimentConfig, InitConfig, differences, to_dict


@dataclasses.dataclass(kw_only=True)
class StudyConfig:
  """Stages that share a start, data and evaluation, so that what differs is the objective."""

  # Shown in the report.
  name: str
  # The start of every objective, and the reference of its KL.
  sft: ExperimentConfig
  # The proxy reward: PPO's reward, and measured for all.
  reward_model: ExperimentConfig
  # What is compared, by the name it has in the report. Their policy.init, reward_model.init and
  # seed are set by the study; data, generation and evaluation must be the same in all.
  objectives: dict[str, ExperimentConfig]
  # Seeds of each objective's data order, sampling and minibatches.
  seeds: tuple[int, ...] = (0, 1, 2)
  # Responses of the SFT policy to each evaluation prompt that the optimal frontier is estimated
  # from; 0: no frontier (data without a gold reward has none).
  frontier_samples: int = 1024
  # Nats a sequence that a policy should stay under; the report says who did not. 0: no budget.
  kl_budget: float = 0.0

  def validate(self) -> None:
    """Checks what makes the comparison fair, and the study's own values.

    Raises:
      ConfigError: names the field, its value, what was expected and what to do.
    """
    if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
      raise ConfigError('seeds', self.seeds, 'one or more different integers >= 0')
    if not self.objectives:
      raise ConfigError('objectives', self.objectives, 'at least one objective')
    for name in ('frontier_samples', 'kl_budget'):
      if not getattr(self, name) >= 0:
        raise ConfigError(name, getattr(self, name), 'a number >= 0')
    if 'sft' in self.objectives:
      raise ConfigError('objectives.sft', '...', 'another name', "'sft' is the start.")
    self._validate_matched()

  def _validate_matched(self) -> None:
    first_name, first = next(iter(self.objectives.items()))
    for name, config in self.objectives.items():
      for part in ('data', 'generation', 'evaluation'):
        found = [
          line
          for line in differences(
            to_dict(getattr(first, part)), to_dict(getattr(config, part)), part
          )
          if not line.startswith('evaluation.every:')  # how often is not what
        ]
        if found:
          raise ConfigError(
            f'objectives.{name}.{part}',
            '...',
            f'the same {part} as objectives.{first_name}',
            f'They differ in {"; ".join(found)}.',
          )

  def stage(self, name: str, seed: int, sft: str, reward_model: str) -> ExperimentConfig:
    """The config of one objective and seed, with its parents' run directories filled in."""
    return dataclasses.replace(
      self.objectives[name],
      seed=seed,
      policy=InitConfig(init=sft),
      reward_model=InitConfig(init=reward_model),
    )
