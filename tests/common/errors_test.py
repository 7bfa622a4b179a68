"""Errors that users cause say what, where, what was expected and what to do."""

import pytest

from rlhf_jax.common.errors import ConfigError, DataError, NonFiniteError, RunError, UserError


def test_a_config_error_reads_as_a_flag() -> None:
  """Field, value, expectation and remedy, in one line; the field can be read off."""
  error = ConfigError('objective.beta', -1.0, 'a number > 0', 'Try 0.1.')
  assert str(error) == '--config.objective.beta=-1.0: expected a number > 0. Try 0.1.'
  assert error.field == 'objective.beta'
  assert str(ConfigError('name', '', 'letters')) == "--config.name='': expected letters."


@pytest.mark.parametrize('kind', [ConfigError, DataError, RunError, NonFiniteError])
def test_every_kind_is_the_users(kind: type) -> None:
  """Programs print these without a traceback."""
  assert issubclass(kind, UserError)
