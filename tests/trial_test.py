"""A checkpoint of transformers is trained on eight devices with LoRA, exported, loaded again."""

from pathlib import Path

import jax
import pytest

from rlhf_jax.hf_folder import open_source
from rlhf_jax.recipes.parts import abstract_decoder
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh
from tests import trial

pytestmark = pytest.mark.slow


def test_a_checkpoint_goes_through_every_stage_and_back(tmp_path: Path) -> None:
  """What is exported holds the merged parameters to the bit, and writes the same greedy tokens.

  DPO and PPO have changed them, so that the texts are not those of the start.
  """
  texts = trial.run(tmp_path)
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  for name, tokens in texts.items():
    assert trial.greedy(tmp_path / f'{name}_folder') == tokens
    run, folder = open_source(tmp_path / name), open_source(tmp_path / f'{name}_folder')
    both = [one.restore_role('policy', abstract_decoder(run.model, mesh)) for one in (run, folder)]
    assert trial.differ(*both) == 0.0
  assert len({str(tokens) for tokens in (*texts.values(), trial.greedy(trial.CHECKPOINT))}) == 3
