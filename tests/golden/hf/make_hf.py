"""Makes the checkpoints in this folder: tiny random models of every family, and what torch says.

Set-up, with a torch for CPU in a virtual environment:

  pip install torch==2.13.0 transformers==5.23.0 safetensors numpy
  python -m tests.golden.hf.make_hf

Each folder holds config.json and model.safetensors as transformers writes them, and expected.npz:
tokens and masks `[2, B, T]` (rows padded on the left, then on the right), logits `[2, B, T, V]`
(those of padding mean nothing), loss, and `gradient/NAME` for each parameter; for classifiers only
scores `[2, B]`. See `reference.py` for the set-up, `cases.py` for the settings.
"""

from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.hf import cases, reference

HERE = Path(__file__).resolve().parent


def main() -> None:
  for name, (model_type, settings) in {**cases.CASES, **cases.SCORERS}.items():
    seed, is_scorer = reference.seed_of(name), name in cases.SCORERS
    model = reference.make_model(model_type, settings, seed, scores=is_scorer)
    folder = HERE / name
    reference.save(model, folder)
    tokens, mask = cases.batches(seed)
    if is_scorer:
      found = {'scores': reference.scores(model, tokens, mask)}
    else:
      found = reference.answers(model, tokens, mask)
    expected: dict[str, Any] = {'tokens': tokens.astype(np.int32), 'mask': mask, **found}
    for key, array in expected.items():
      if not np.all(np.isfinite(array)):
        raise ValueError(f'{name}: {key} is not finite.')
    np.savez_compressed(folder / 'expected.npz', **expected)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f'{folder.name}: {size / 1024:.0f} KB')


if __name__ == '__main__':
  main()
