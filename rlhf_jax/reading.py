"""The data of a stage: read once in a process, and held against what was read before."""

import functools
import json
import pathlib
import re

from rlhf_jax.config_values import canonical_json, from_dict, to_dict
from rlhf_jax.data.changes import FileState, file_state, require_unchanged
from rlhf_jax.data.config import CONTROL, DataConfig
from rlhf_jax.data.segments import ControlFeedback
from rlhf_jax.data.segments import make as make_segments
from rlhf_jax.data.sources import load as load_feedback
from rlhf_jax.feedback.dataset import Feedback
from rlhf_jax.runs import fingerprint

# The data files that this process has read.
_READ: dict[str, FileState | None] = {}


def load_data(data: DataConfig, root: str | pathlib.Path) -> Feedback | ControlFeedback:
  """The feedback of a stage; the stages of one process that read the same data share it.

  Raises DataError also where a file is not what it was when this process first read it: stages that
  belong together would learn from different records.
  """
  paths = [path for path in (data.path, data.held_out_path) if path and data.source == 'jsonl']
  before = {path: _READ.get(path) or file_state(path) for path in paths}
  feedback = _load(canonical_json(to_dict(data)), quarantine_file(data, root))
  for path, state in before.items():
    require_unchanged(path, state)
  _READ.update(before)
  return feedback


@functools.lru_cache(maxsize=2)
def _load(data: str, quarantine: pathlib.Path) -> Feedback | ControlFeedback:
  config = from_dict(DataConfig, json.loads(data))
  if config.source == CONTROL:
    return make_segments(config.lqr, config.held_out)
  return load_feedback(config, quarantine)


def quarantine_file(data: DataConfig, root: str | pathlib.Path) -> pathlib.Path:
  """Where bad records of a source go; the stages that read it under one root share the file."""
  name = pathlib.Path(data.path).name if data.path is not None else data.source
  # One name, whatever a source is called: it may have separators in it.
  name = re.sub(r'[^\w.-]+', '_', name)[:64]
  digest = fingerprint([data.source, data.path, data.held_out_path])[:8]
  return pathlib.Path(root) / 'quarantine' / f'{name}-{digest}.jsonl'
