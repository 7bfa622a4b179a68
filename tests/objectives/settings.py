"""What every test of `validate` does."""

from typing import Any

import pytest

from rlhf_jax.common.errors import ConfigError


def assert_refused(kind: type, settings: dict[str, Any], field: str) -> None:
  """The defaults are fine; with these settings the error has the field's dotted name."""
  kind().validate('objective')
  with pytest.raises(ConfigError) as error:
    kind(**settings).validate('objective')
  assert error.value.field == f'objective.{field}'
