"""What is noted of a checkpoint tells of every change to itself and to the arrays."""

import copy
import json
from typing import Any

import pytest

from rlhf_jax.training import seals

SUMS = {'params_policy': {'bias': 'float32[2]:00', 'kernel': 'float32[8, 2]:0f'}}
PROGRESS = {'tokens': 3, 'window': {'loss': [1, 0.1]}}


def test_what_was_noted_comes_back_from_json() -> None:
  noted = json.loads(json.dumps(seals.seal(PROGRESS, {'reward': 0.5}, SUMS)))
  assert seals.unseal(noted, {'reward': 0.5}) == (PROGRESS, SUMS)
  # The library gives no metrics as an empty dict.
  assert seals.unseal(seals.seal(PROGRESS, None, SUMS), {}) == (PROGRESS, SUMS)


@pytest.mark.parametrize('path', [('progress', 'tokens'), ('arrays', 'params_policy', 'bias')])
def test_a_change_of_any_note_is_told(path: tuple[str, ...]) -> None:
  noted: Any = copy.deepcopy(seals.seal(PROGRESS, None, SUMS))
  holder = noted
  for name in path[:-1]:
    holder = holder[name]
  holder[path[-1]] = 'other'
  with pytest.raises(ValueError, match='differ from what was written'):
    seals.unseal(noted, None)
  with pytest.raises(ValueError, match='metrics differ'):
    seals.unseal(seals.seal(PROGRESS, {'reward': 0.5}, SUMS), {'reward': 9.5})
  del noted['sha256']
  for other in (noted, None):
    with pytest.raises(ValueError, match='no checksums'):
      seals.unseal(other, None)


def test_other_values_are_named_by_their_first() -> None:
  found = {'params_policy': {'bias': 'float32[2]:01', 'kernel': 'float32[8, 2]:01'}}
  with pytest.raises(ValueError, match="params_policy: 'bias' and 1 others differ"):
    seals.check_values(found, SUMS)
  seals.check_values(SUMS, SUMS)
