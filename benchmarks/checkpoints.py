"""Times how a checkpoint folder of the Hugging Face world is read, and written again."""

import os
import pathlib
import shutil
import tempfile
import time
from typing import Any

import jax

from benchmarks import workloads
from benchmarks.measuring import Step
from benchmarks.peer import Start, contest
from rlhf_jax.models import decoder, hf_export, hf_load


def make(size: str, dtype: str, folder: pathlib.Path, tokenizer: pathlib.Path) -> pathlib.Path:
  """A checkpoint of a size in `folder`, of chance weights, unless it is there already."""
  target = folder / f'checkpoint_{dtype}'
  if not target.exists():
    model = workloads.SIZES[size]
    params = decoder.init(model, jax.random.key(0))
    hf_export.export_policy(target, model, params, hf_export.Assets(tokenizer), dtype=dtype)
  return target


def reading_and_writing(source: pathlib.Path, target: pathlib.Path, dtype: str) -> Step:
  """Loads a checkpoint folder onto the device, and exports it to another, which is deleted.

  Parameters are float32 on the device; `dtype` is that of both folders.
  """

  def step() -> dict[str, float]:
    start = time.perf_counter()
    checkpoint = hf_load.open_checkpoint(source)
    abstract = jax.eval_shape(lambda: decoder.init(checkpoint.model, jax.random.key(0)))
    params = jax.block_until_ready(hf_load.load_decoder(checkpoint, abstract))
    loaded = time.perf_counter()
    assets = hf_export.read_assets(source)
    hf_export.export_policy(target, checkpoint.model, params, assets, dtype=dtype)
    written = time.perf_counter()
    shutil.rmtree(target)
    return {'load': loaded - start, 'export': written - loaded}

  return step


def measure(source: pathlib.Path, dtype: str, repeats: int, start: Start | None) -> dict[str, Any]:
  """The numbers of load_export, of the checkpoint in `source`, whose tensors are of `dtype`."""
  size = sum(os.path.getsize(file) for file in source.glob('*.safetensors'))
  with tempfile.TemporaryDirectory() as temporary:
    step = reading_and_writing(source, pathlib.Path(temporary) / 'written', dtype)
    found = contest(step, start, repeats)
  numbers = found.numbers()
  speeds = {part: size / row['ours']['median'] for part, row in numbers['seconds'].items()}
  return {**numbers, 'bytes': size, 'bytes_per_second': speeds}
