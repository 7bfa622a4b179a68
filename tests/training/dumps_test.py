"""What is kept of a step that went wrong is whole, or is said to be damaged."""

import json
import pathlib

import numpy as np
import pytest

from rlhf_jax.common.errors import RunError
from rlhf_jax.training import dumps


@pytest.mark.parametrize('damage', ['cut', 'bit', 'json'])
def test_a_damaged_step_is_named(damage: str, tmp_path: pathlib.Path) -> None:
  (tmp_path / dumps.FOLDER).mkdir()
  path = tmp_path / dumps.FOLDER / 'step_00000003.npz'
  np.savez(path, x=np.arange(1000.0))
  path.with_suffix('.json').write_text(json.dumps({'step': 3, 'loss': 'nan'}))
  assert dumps.load(tmp_path, 3).batch['x'].shape == (1000,)
  content = bytearray(path.read_bytes())
  if damage == 'cut':
    path.write_bytes(content[: len(content) // 2])
  elif damage == 'bit':
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
  else:
    path.with_suffix('.json').write_text('{"step": 3, "loss"')
  with pytest.raises(RunError, match=r'step_00000003.npz: damaged \('):
    dumps.load(tmp_path, 3)
