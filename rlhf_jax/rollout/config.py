"""How sampled responses are scored."""

import dataclasses

from rlhf_jax.common.errors import ConfigError


@dataclasses.dataclass(kw_only=True)
class RewardConfig:
  """One of the rewards that make up a response's score."""

  # 'reward_model' (the config's reward_model), 'task' (the embedded task's gold reward), or a
  # Python function, 'FILE.py:NAME': (prompts, responses) -> numbers, one a response. It judges
  # each by itself: of several processes, every one calls it with a part of a batch.
  source: str = 'reward_model'
  # 'reward_model' only: another one than the config's, a run or a config, e.g. for safety beside
  # helpfulness; None: the config's.
  init: str | None = None
  # Functions only: further files that it reads, lexicons or modules; with other content the stage
  # is another one.
  files: tuple[str, ...] = ()
  # Its weight in the sum.
  weight: float = 1.0
  # Above this it counts no more (a threshold on what is good enough; Moskovitz et al. 2023). None:
  # no limit.
  clip_above: float | None = None
  # Where this reward is below the gate, it alone is the score, weighted. None: no gate.
  gate_below: float | None = None
  # Leave it out of the sum where it is above the gate (Touvron et al. 2023, Llama 2, section 3.2.3:
  # safety below its gate, helpfulness alone above).
  gate_only: bool = False

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    file, colon, name = self.source.rpartition(':')
    if self.source not in ('reward_model', 'task') and not (
      colon and file.endswith('.py') and name.isidentifier()
    ):
      raise ConfigError(
        f'{path}.source', self.source, "'reward_model', 'task' or a function, 'FILE.py:NAME'"
      )
    if self.init is not None and self.source != 'reward_model':
      raise ConfigError(f'{path}.init', self.init, f'None with source {self.source!r}')
    if self.files and self.source in ('reward_model', 'task'):
      raise ConfigError(f'{path}.files', self.files, f'none with source {self.source!r}')
    if self.gate_only and self.gate_below is None:
      raise ConfigError(f'{path}.gate_only', True, f'False without {path}.gate_below')
    if self.weight == 0:
      raise ConfigError(f'{path}.weight', self.weight, 'a number that is not 0', 'Leave it out.')


@dataclasses.dataclass(kw_only=True)
class RolloutConfig:
  """What is paid for a sampled response; read by objectives that learn from their own samples."""

  # What a response is paid: a weighted sum of rewards, with gates.
  rewards: tuple[RewardConfig, ...] = dataclasses.field(default_factory=lambda: (RewardConfig(),))
  # Responses that never stopped: 'none' leaves their score, 'replace' puts missing_stop_value in
  # its place (-1 in Huang et al. 2024), 'subtract' takes missing_stop_value off (TRL: 1).
  missing_stop: str = 'none'
  missing_stop_value: float = -1.0
  # Scoring only: cut the response after the first such token at or after the given position; the
  # policy trains on the uncut response, and one without it counts as never stopped (Ziegler et al.
  # 2019: token 13 after position 16). -1 is off.
  score_truncation_token: int = -1
  score_truncation_after: int = 0
  # Also measure the exact per-token KL from full logits (costs one `[B, R, V]` array twice).
  exact_kl: bool = False

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if not self.rewards:
      raise ConfigError(f'{path}.rewards', self.rewards, 'at least one reward')
    for number, reward in enumerate(self.rewards):
      reward.validate(f'{path}.rewards[{number}]')
      if (reward.source, reward.init) in [(r.source, r.init) for r in self.rewards[:number]]:
        raise ConfigError(
          f'{path}.rewards[{number}].source',
          reward.source,
          'another one than those before it',
          'The same twice is twice its weight.',
        )
    if all(reward.gate_only for reward in self.rewards):
      raise ConfigError(f'{path}.rewards', '...', 'at least one that is not gate_only')
    if self.score_truncation_after < 0:
      raise ConfigError(
        f'{path}.score_truncation_after', self.score_truncation_after, 'an integer >= 0'
      )
    kinds = ('none', 'replace', 'subtract')
    if self.missing_stop not in kinds:
      raise ConfigError(f'{path}.missing_stop', self.missing_stop, f'one of {kinds}')
    if self.missing_stop == 'subtract' and self.missing_stop_value <= 0:
      raise ConfigError(
        f'{path}.missing_stop_value',
        self.missing_stop_value,
        "a number > 0 with missing_stop 'subtract'",
        'Taking a negative number off would reward responses that never stop.',
      )

  def sources(self) -> tuple[str, ...]:
    """Where the rewards come from."""
    return tuple(reward.source for reward in self.rewards)
