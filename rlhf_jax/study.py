"""A study: one start, one set of preferences, one reward model; objectives x seeds compared."""

import dataclasses

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.prng import check_seed
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.config_values import NAME, differences, is_name, to_dict
from rlhf_jax.data.config import EMBEDDED
from rlhf_jax.objectives import objective_of


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
    self._validate_types()
    if not self.seeds or len(set(self.seeds)) < len(self.seeds):
      raise ConfigError('seeds', self.seeds, 'one or more different integers')
    for seed in self.seeds:
      check_seed('seeds', seed)
    if not self.objectives:
      raise ConfigError('objectives', self.objectives, 'at least one objective')
    for name in ('frontier_samples', 'kl_budget'):
      if not getattr(self, name) >= 0:
        raise ConfigError(name, getattr(self, name), 'a number >= 0')
    if 'sft' in self.objectives:
      raise ConfigError('objectives.sft', '...', 'another name', "'sft' is the start.")
    for name in self.objectives:
      if not is_name(name):
        field = f'objectives.{name}'
        raise ConfigError(field, '...', f'a name of {NAME}', 'Folders have it in their names.')
    self._validate_matched()
    self._validate_stages()

  def _validate_types(self) -> None:
    """Of the study's own fields; a stage's are checked with the stage."""

    def demand(field: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
      if not isinstance(value, kinds) or isinstance(value, bool):
        raise ConfigError(field, value, f'{expected}, not {type(value).__name__}')

    demand('name', self.name, str, 'a text')
    demand('seeds', self.seeds, tuple, 'a tuple of integers')
    for seed in self.seeds:
      demand('seeds', seed, int, 'integers')
    demand('frontier_samples', self.frontier_samples, int, 'an integer')
    demand('kl_budget', self.kl_budget, (int, float), 'a number')
    demand('objectives', self.objectives, dict, 'a dict of ExperimentConfigs by name')
    stages: dict[str, object] = {'sft': self.sft, 'reward_model': self.reward_model}
    stages |= {f'objectives.{name}': config for name, config in self.objectives.items()}
    for name, config in stages.items():
      demand(name, config, ExperimentConfig, 'an ExperimentConfig')

  def _validate_matched(self) -> None:
    """Compares every stage with the first objective."""
    for name, config in self.objectives.items():
      if config.reward_model.ensemble:
        raise ConfigError(
          f'objectives.{name}.reward_model.ensemble',
          config.reward_model.ensemble,
          'none in a study',
          'All objectives have the one reward model of the study.',
        )
    first_name, first = next(iter(self.objectives.items()))
    for name, config in self.objectives.items():
      for part in ('data', 'generation', 'evaluation'):
        self._same(f'objectives.{name}', config, f'objectives.{first_name}', first, part)
    for name in ('sft', 'reward_model'):
      self._same(name, getattr(self, name), f'objectives.{first_name}', first, 'data')

  def _same(
    self, name: str, config: ExperimentConfig, than: str, first: ExperimentConfig, part: str
  ) -> None:
    found = [
      line
      for line in differences(to_dict(getattr(first, part)), to_dict(getattr(config, part)), part)
      # How often is not what; and a start may imitate all responses, chosen or not.
      if not line.startswith(('evaluation.every:', 'data.responses:', 'data.convert:'))
    ]
    if found:
      raise ConfigError(
        f'{name}.{part}', '...', f'the same {part} as {than}', f'They differ in {"; ".join(found)}.'
      )

  def _validate_stages(self) -> None:
    """Every stage's own values, before the first of them is trained."""
    for name, config in self.stages().items():
      try:
        config.validate()
      except ConfigError as error:
        raise ConfigError.within(name, error) from error
    self._validate_roles()
    first = next(iter(self.objectives.values()))
    if first.data.source != EMBEDDED:
      raise ConfigError(
        'objectives.*.data.source',
        first.data.source,
        f'{EMBEDDED!r}',
        'A study is judged by a gold reward of texts, which only that task has.',
      )
    if first.evaluation.prompts < 2:
      raise ConfigError(
        'objectives.*.evaluation.prompts', first.evaluation.prompts, 'at least 2, for intervals'
      )
    drawn = first.generation
    if self.frontier_samples and (drawn.temperature == 0 or drawn.top_k or drawn.top_p != 1):
      raise ConfigError(
        'frontier_samples',
        self.frontier_samples,
        '0 with greedy or filtered sampling',
        'KLs are those of the unfiltered policy: the optimum would be that of another one.',
      )

  def _validate_roles(self) -> None:
    """Policies are compared, a reward model judges them, and it is judged itself."""
    stages = {f'objectives.{name}': config for name, config in self.objectives.items()}
    for name, config in {'sft': self.sft, 'reward_model': self.reward_model, **stages}.items():
      wanted = 'reward_model' if name == 'reward_model' else 'policy'
      objective = objective_of(config.objective)
      if objective.trains != wanted:
        raise ConfigError(
          f'{name}.objective', objective.name, f'an objective that trains a {wanted}'
        )
    if self.reward_model.evaluation.records < 1:
      raise ConfigError(
        'reward_model.evaluation.records',
        self.reward_model.evaluation.records,
        'at least 1: the report says how often it is right on held-out records',
      )

  def stages(self) -> dict[str, ExperimentConfig]:
    """Every stage by its path in the study, starting from places that are still to come."""
    some = 'a stage of this study'
    start = dataclasses.replace(self.reward_model.policy, init=some)
    return {
      'sft': self.sft,
      'reward_model': dataclasses.replace(self.reward_model, policy=start),
      **{f'objectives.{name}': self.stage(name, 0, some, some) for name in self.objectives},
    }

  def stage(self, name: str, seed: int, sft: str, reward_model: str) -> ExperimentConfig:
    """The config of one objective and seed, with its parents' run directories filled in."""
    config = self.objectives[name]
    return dataclasses.replace(
      config,
      seed=seed,
      policy=dataclasses.replace(config.policy, init=sft),
      reward_model=dataclasses.replace(config.reward_model, init=reward_model),
    )
