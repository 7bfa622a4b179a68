"""What the sampling config refuses."""

from typing import Any

import pytest

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.generation.config import GenerationConfig


@pytest.mark.parametrize(
  ('changes', 'field'),
  [
    (dict(temperature=-0.1), 'temperature'),
    (dict(temperature=float('inf')), 'temperature'),
    (dict(temperature=float('nan')), 'temperature'),
    (dict(top_k=-1), 'top_k'),
    (dict(top_p=0.0), 'top_p'),
    (dict(top_p=1.1), 'top_p'),
    (dict(stop_tokens=(3, -1)), 'stop_tokens'),
    (dict(dtype='int8'), 'dtype'),
  ],
)
def test_refuses_what_cannot_be_sampled(changes: dict[str, Any], field: str) -> None:
  """The error names the field and its value."""
  with pytest.raises(ConfigError) as caught:
    GenerationConfig(**changes).validate('generation')
  assert caught.value.field == f'generation.{field}'
  assert repr(changes[field]) in str(caught.value)


def test_greedy_and_filtered_sampling_are_fine() -> None:
  """Limits of the ranges."""
  GenerationConfig().validate('generation')
  GenerationConfig(temperature=0.0, top_k=1, top_p=1e-3, stop_tokens=(0,)).validate('generation')
