"""Checkpoints of every family give the numbers that torch and transformers gave.

They lie in tests/golden/hf, which also says how they were made. `make parity` compares fresh ones.
"""

import jax
import numpy as np
import pytest

from rlhf_jax.common.types import Sequences
from rlhf_jax.models import roles
from tests.golden.hf import cases
from tests.models import hf_golden, hf_parity

# Absolute, of logits as large as 4; of gradients, relative to the largest of a tensor.
TOLERANCE = 1e-5

# The first of each family is quick enough for every day.
_FIRST = {model_type: name for name, (model_type, _) in reversed(cases.CASES.items())}
NAMES = [
  name if name in _FIRST.values() else pytest.param(name, marks=pytest.mark.slow)
  for name in cases.CASES
]


@pytest.mark.parametrize('name', NAMES)
def test_logits_gradients_and_cached_decoding(name: str) -> None:
  """Rows padded left and right: logits of all real tokens, read at once or not; all gradients."""
  golden = hf_golden.load(name)
  found = hf_parity.answers(golden.checkpoint, golden.params, golden.expected)
  kinds = {key.removeprefix('gradient/') for key in golden.expected if key.startswith('gradient/')}
  assert found.gradients.keys() == kinds
  for what, error in hf_parity.errors(found, golden.expected).items():
    assert error < TOLERANCE, f'{what}: {error}'


@pytest.mark.parametrize('name', cases.SCORERS)
def test_scores(name: str) -> None:
  """A classifier with one label is a reward model that gives its scores."""
  golden = hf_golden.load(name)
  tokens, mask = golden.expected['tokens'], golden.expected['mask']

  @jax.jit
  def score(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    whole = Sequences(tokens[:, :4], mask[:, :4], tokens[:, 4:], mask[:, 4:])
    return roles.reward_score(golden.model, golden.params, whole)

  found = np.stack([score(*batch) for batch in zip(tokens, mask, strict=True)])
  np.testing.assert_allclose(found, golden.expected['scores'], atol=TOLERANCE)
