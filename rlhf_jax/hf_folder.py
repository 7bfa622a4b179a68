"""Checkpoint folders of the Hugging Face world in the place of finished runs."""

import dataclasses
import functools
import hashlib
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

from rlhf_jax.common.errors import CheckpointError, RunError
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.data import tokenizer_folders
from rlhf_jax.data.tokenizer_folders import GENERATION
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.data.tokenizers import load as load_tokenizer
from rlhf_jax.models import hf_export
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf_files import CONFIG, DTYPES
from rlhf_jax.models.hf_hub import HUB, download
from rlhf_jax.models.hf_load import (
  ignored,
  is_checkpoint,
  load_decoder,
  load_scorer,
  open_checkpoint,
)
from rlhf_jax.models.hf_peft import FILES, add_adapter, is_adapter, open_adapter, read_score
from rlhf_jax.objectives.reward_model import RewardModelConfig
from rlhf_jax.objectives.sft import SFTConfig
from rlhf_jax.runs import ASSETS, Run

# Embedding tables get a multiple of so many rows, so that the mesh's tensor axis divides them
# (Megatron-LM: make-vocab-size-divisible-by).
_VOCAB_MULTIPLE = 128


class HfFolder(Run):
  """What a stage asks of a finished run, answered by a checkpoint folder or a name of the hub.

  It has the one role that its architecture says: 'policy', or 'reward_model' for a sequence
  classifier with one label.
  """

  def __init__(self, source: str | pathlib.Path):
    """Reads config.json, of the hub too; raises CheckpointError."""
    self.opened = open_checkpoint(source)
    super().__init__(self.opened.folder)

  @property
  def result(self) -> dict[str, Any]:
    """Something: what lies there is finished."""
    return {'step': 0, 'best_step': None}

  @property
  def config(self) -> ExperimentConfig:
    """A config as of a stage that trained it on likelihood, or on comparisons."""
    objective = RewardModelConfig() if self.opened.scores else SFTConfig()
    return ExperimentConfig(name=self.source.name, objective=objective, model=self.model)

  @property
  def params_sha256(self) -> str:
    """Of its files: the weights, what they mean as a decoder, the tokenizer and where it stops."""
    names = (CONFIG, GENERATION, *hf_export.TOKENIZER_FILES)
    weights = sorted({header.file for header in self.opened.headers.values()})
    files = [self.folder / name for name in names]
    return _digest([*files, *weights]).hexdigest()

  def params_identity(self, checkpoint: str) -> str:
    """What tells its parameters from all others; raises RunError for another than 'final'."""
    self.step(checkpoint)
    return f'sha256:{self.params_sha256}'

  def parents(self) -> dict[str, Run]:
    """None are known."""
    return {}

  @property
  def model(self) -> ModelConfig:
    """The decoder; embedding tables have some rows more, which nothing reads.

    Reward models compute in the type of their config.json (that of their tensors if it names none)
    if that is bfloat16; policies as the stage asks.
    """
    config = self.opened.config
    said = config.get('dtype', config.get('torch_dtype'))
    narrow = self.opened.scores and (said or self.stored_dtype) == 'bfloat16'
    return dataclasses.replace(
      self.opened.model,
      vocab_multiple=_VOCAB_MULTIPLE,
      dtype='bfloat16' if narrow else 'float32',
    )

  @property
  def stored_dtype(self) -> str:
    """The type of its weights; of several the widest."""
    weights = {name: header for name, header in self.opened.headers.items() if not ignored(name)}
    found = {DTYPES.get(header.dtype, 'float32') for header in weights.values()}
    return next(iter(found)) if len(found) == 1 else 'float32'

  @property
  def tokenizer_folder(self) -> pathlib.Path:
    """Where its tokenizer and chat template lie."""
    return self.folder

  def tokenizer(self) -> Tokenizer:
    """Its tokenizer; raises CheckpointError if that has more ids than there are embeddings.

    Special tokens may be more: it is texts with one of those that are refused.
    """
    tokenizer, embedded = load_tokenizer(self.tokenizer_folder), self.model.vocab_size
    if tokenizer.needed_size > embedded:
      raise CheckpointError(
        f'{self.tokenizer_folder}: its tokenizer has {tokenizer.needed_size} ids, and its model '
        f'embeddings for {embedded}. Use the tokenizer it was trained with.'
      )
    if tokenizer.vocab_size > embedded:
      tokenizer = dataclasses.replace(tokenizer, embedded=embedded)
    return tokenizer

  def step(self, checkpoint: str) -> int:
    """0, of the only parameters there are."""
    if checkpoint != 'final':
      raise RunError(f"{self.source}: a checkpoint folder has 'final' parameters only.")
    return 0

  def restore_role(self, role: str, abstract: Any, checkpoint: str = 'final') -> Any:
    """The parameters of its role, in the shardings of `abstract`."""
    self.step(checkpoint)
    loads = {'policy': load_decoder, 'reward_model': load_scorer}
    if role not in loads:
      raise RunError(f'{self.source}: a checkpoint folder has no {role.replace("_", " ")}.')
    return loads[role](self.opened, abstract)

  def save_assets(self, target: pathlib.Path) -> None:
    """Keeps config.json and the like in a run that starts here, for its export."""
    (target / ASSETS).mkdir(exist_ok=True)
    for name in (CONFIG, GENERATION):
      if (self.folder / name).is_file():
        shutil.copyfile(self.folder / name, target / ASSETS / name)
    hf_export.copy_tokenizer(self.tokenizer_folder, target / ASSETS)


class PeftFolder(HfFolder):
  """A LoRA adapter of PEFT and the checkpoint that it names, merged into one model."""

  def __init__(self, source: str | pathlib.Path):
    """Reads both configs; raises CheckpointError."""
    self.adapter = open_adapter(pathlib.Path(source))
    try:
      super().__init__(self.adapter.base)
    except CheckpointError as error:
      raise CheckpointError(
        f'{self.source}: it needs the model it was trained on. {error}'
      ) from error
    if self.adapter.scores and not self.opened.scores:
      if self.adapter.score is None:
        raise CheckpointError(
          f'{self.source}: an adapter of a classifier without its score, on {self.folder}, which '
          "has none either. Train it with modules_to_save=['score']."
        )
      self.opened = self.opened.as_scorer()

  @property
  def source(self) -> pathlib.Path:
    """The adapter's folder."""
    return self.adapter.folder

  @property
  def params_sha256(self) -> str:
    """Of the base and of the adapter's files."""
    own = () if self.tokenizer_folder == self.folder else (GENERATION, *hf_export.TOKENIZER_FILES)
    digest = _digest(self.source / name for name in (*FILES, *own))
    digest.update(super().params_sha256.encode())
    return digest.hexdigest()

  @property
  def tokenizer_folder(self) -> pathlib.Path:
    """The adapter's where it has a tokenizer, which may have another template than the base's."""
    own = (self.source / tokenizer_folders.CONFIG).is_file()
    return self.source if own else self.folder

  def tokenizer(self) -> Tokenizer:
    """As of a whole model; responses end where the base ends them, too."""
    found = super().tokenizer()
    of_base = tokenizer_folders.stop_tokens(self.folder)
    more = (i for i in of_base if i not in found.stop_ids and i < found.vocab_size)
    return dataclasses.replace(found, stops=(*found.stops, *more))

  def restore_role(self, role: str, abstract: Any, checkpoint: str = 'final') -> Any:
    """The parameters of its role, in the shardings of `abstract`."""
    if role == 'reward_model' and self.opened.scores:
      self.step(checkpoint)
      score = read_score(self.adapter, self.opened.model.width)
      base = load_scorer(self.opened, abstract, score)
      return {**base, 'trunk': add_adapter(self.adapter, self.opened, base['trunk'])}
    base = super().restore_role(role, abstract, checkpoint)
    return add_adapter(self.adapter, self.opened, base)


def open_source(source: str | pathlib.Path) -> Run:
  """The run, finished or not, in a directory; or the checkpoint folder, of the hub too."""
  if str(source).startswith(HUB) and is_adapter(folder := download(str(source))):
    source = folder
  if is_adapter(source):
    return PeftFolder(source)
  return HfFolder(source) if is_checkpoint(source) else Run(source)


def assets_of(run: Run) -> hf_export.Assets:
  """The config and the tokenizer of the folder a run goes back to, or its own tokenizer alone."""
  if isinstance(run, HfFolder):
    return dataclasses.replace(hf_export.read_assets(run.folder), tokenizer=run.tokenizer_folder)
  if (run.folder / ASSETS).is_dir():
    return hf_export.read_assets(run.folder / ASSETS, trained=run.folder / 'tokenizer')
  return hf_export.Assets(run.folder / 'tokenizer')


def is_source(source: str) -> bool:
  """Whether a name is that of a directory or of something on the hub, not of a config file."""
  return source.startswith(HUB) or pathlib.Path(source).is_dir()


def _digest(paths: Iterable[pathlib.Path]) -> Any:
  """SHA-256 of the names and contents of those files that there are."""
  digest = hashlib.sha256()
  for path in paths:
    if path.is_file():
      status = path.stat()
      part = _sha256(path, status.st_size, status.st_mtime_ns)
      digest.update(f'{path.name}:{part}\n'.encode())
  return digest


@functools.lru_cache(maxsize=1024)
def _sha256(path: pathlib.Path, size: int, changed: int) -> str:
  """Of a file; its size and time of change only make the cache forget."""
  del size, changed
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
