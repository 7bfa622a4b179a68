"""Errors that a user can cause; programs print their message alone and exit with 1."""


class UserError(Exception):
  """What the user gave is wrong; the message says what, where, what was expected, what to do."""


class ConfigError(UserError):
  """A configuration value, or a combination of them, that cannot work."""

  def __init__(self, field: str, value: object, expected: str, remedy: str = ''):
    """`field` is the dotted path after `--config.`; `expected` completes 'expected ...'."""
    text = f'--config.{field}={value!r}: expected {expected}.'
    super().__init__(f'{text} {remedy}'.strip())
    self.field = field
    self._parts = (value, expected, remedy)

  @classmethod
  def within(cls, path: str, error: 'ConfigError') -> 'ConfigError':
    """The same error about a config that lies at `path` of a larger one."""
    return cls(f'{path}.{error.field}', *error._parts)


class DataError(UserError):
  """A data source that is missing, malformed, or not what the stage needs."""


class RunError(UserError):
  """A run directory that is missing, unfinished, damaged, or belongs to another config."""


class CheckpointError(UserError):
  """A checkpoint of the Hugging Face world that is malformed, or that no decoder of ours equals."""


class NonFiniteError(UserError):
  """The loss or the gradients are not finite any more; what is needed to study it was saved."""


class HealthError(UserError):
  """A monitor has stopped the run, as its config asked; the state was saved."""


class ServerError(UserError):
  """A server that samples cannot be reached, refuses, or answers what cannot be learnt from."""
