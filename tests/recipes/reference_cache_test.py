"""The reference's log-probs on disk: found again, checked, and made again where they do not fit."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest

from rlhf_jax.objectives.dpo import DPOConfig
from rlhf_jax.recipes import offline
from tests import tiny

pytestmark = pytest.mark.slow


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
  """One entry a time that the reference really reads a dataset."""
  times: list[int] = []
  real = offline.device_batches

  def counted(parts: Any, columns: Any, size: int) -> Any:
    times.append(len(columns))
    return real(parts, columns, size)

  monkeypatch.setattr(offline, 'device_batches', counted)
  return times


def make_config(parents: pathlib.Path, *, beta: float = 0.1, **changes: Any) -> Any:
  objective = DPOConfig(reference='cached', beta=beta)
  return tiny.make_config('dpo', parents, objective=objective, steps=2, **changes)


def files(root: pathlib.Path) -> list[pathlib.Path]:
  return sorted((root / 'reference_logprobs').iterdir())


def test_other_seeds_and_variants_find_them(
  parents: pathlib.Path, tmp_path: pathlib.Path, scored: list[int]
) -> None:
  """With the same result as without; other data and another start are other numbers."""
  first = tiny.run_stage(make_config(parents), tmp_path / 'first').outcome.run
  assert len(scored) == 1 and len(files(tmp_path)) == 1
  again = tiny.run_stage(make_config(parents), tmp_path / 'again').outcome.run
  tiny.run_stage(make_config(parents, seed=1), tmp_path / 'seed')
  tiny.run_stage(make_config(parents, beta=0.5), tmp_path / 'beta')
  assert len(scored) == 1 and again.params_sha256 == first.params_sha256
  data = make_config(parents).data
  tiny.run_stage(
    make_config(parents, data=dataclasses.replace(data, prompt_length=3)), tmp_path / 'data'
  )
  policy = dataclasses.replace(make_config(parents).policy, init=str(tmp_path / 'first'))
  tiny.run_stage(make_config(parents, policy=policy), tmp_path / 'start')
  tiny.run_stage(make_config(parents, batch_size=4), tmp_path / 'rows')
  assert len(scored) == 4 and len(files(tmp_path)) == 4


@pytest.mark.parametrize('damage', ['cut', 'bit', 'empty'])
def test_a_damaged_file_is_made_again(
  damage: str,
  parents: pathlib.Path,
  tmp_path: pathlib.Path,
  scored: list[int],
  capsys: pytest.CaptureFixture[str],
) -> None:
  """It is said which; the numbers are the same."""
  first = tiny.run_stage(make_config(parents), tmp_path / 'first').outcome.run
  (path,) = files(tmp_path)
  whole = path.read_bytes()
  middle = whole.index(b'logprobs.npy') + 400
  flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
  path.write_bytes({'cut': whole[:200], 'bit': flipped, 'empty': b''}[damage])
  again = tiny.run_stage(make_config(parents), tmp_path / 'again').outcome.run
  assert again.params_sha256 == first.params_sha256 and len(scored) == 2
  assert f'{path}: damaged' in capsys.readouterr().out
  assert len(path.read_bytes()) == len(whole) and files(tmp_path) == [path]


def test_a_root_that_cannot_be_written_to_is_no_obstacle(
  parents: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  (tmp_path / 'reference_logprobs').write_text('in the way')
  tiny.run_stage(make_config(parents), tmp_path / 'run')
  assert 'not kept for the next time' in capsys.readouterr().out


def test_what_is_kept_is_what_the_reference_says(
  parents: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  tiny.run_stage(make_config(parents), tmp_path / 'run')
  with np.load(files(tmp_path)[0], allow_pickle=False) as file:
    kept = file['logprobs']
  assert kept.dtype == np.float32 and kept.ndim == 3 and (kept <= 0).all() and (kept < -1).any()
