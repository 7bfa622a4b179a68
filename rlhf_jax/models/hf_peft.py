"""LoRA adapters as PEFT has them: adapter_config.json and adapter_model.safetensors in a folder.

It keeps, for each linear map of transformers' model, A `[rank, inputs]` and B `[outputs, rank]`.
Where that map is several of ours (query, key and value of GPT-2 and GPT-NeoX) the ranks add up: its
A holds ours one below the other, and its B is zero but where an output meets its own A.

An adapter of a reward model (task_type SEQ_CLS) keeps the score's weights beside them, whole. What
PEFT has no place for, the score's bias, is in a file of ours.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from rlhf_jax.common import trees
from rlhf_jax.common.errors import CheckpointError
from rlhf_jax.data.tokenizer_folders import read_json
from rlhf_jax.models import hf_layout, hf_model
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf_families import Family
from rlhf_jax.models.hf_files import Entry, Header, headers_of, write_file, write_json
from rlhf_jax.models.hf_hub import HUB, parse
from rlhf_jax.models.hf_load import SCORE, SCORE_BIAS, Checkpoint, Score
from rlhf_jax.models.hf_model import Piece
from rlhf_jax.models.layers import PROJECTIONS

ADAPTER_CONFIG, ADAPTER = 'adapter_config.json', 'adapter_model.safetensors'
OURS = 'rlhf_jax.json'
FILES = (ADAPTER_CONFIG, ADAPTER, OURS)  # the last is not always there
_PREFIX = 'base_model.model.'
_TENSOR = re.compile(
  r'base_model\.model\.(?P<module>.+)\.lora_(?P<which>[AB])(\.default)?\.weight$'
)
_SCORE = re.compile(r'base_model\.model\.score(\.modules_to_save)?(\.default)?\.weight$')
_NAME = re.compile(r'\w[\w.-]*(/\w[\w.-]*)?')  # of the hub; all else is a path
_SCORES = 'SEQ_CLS'
_HEADS = {'score', 'classifier'}  # PEFT lists both, though a model has one of them
# What an adapter may not ask for, and what it must say of it.
_ONLY: dict[str, tuple[Any, ...]] = {
  'use_dora': (None, False),
  'bias': (None, 'none'),
  'modules_to_save': (None, []),
  'lora_bias': (None, False),
  # Others change the base's weights before they put matrices beside them.
  'init_lora_weights': (None, False, 'gaussian', 'eva', True),
  'use_qalora': (None, False),
  'use_bdlora': (None, False),
  'layer_replication': (None,),
  'target_parameters': (None, []),
  'trainable_token_indices': (None,),
  'alora_invocation_tokens': (None,),
  'arrow_config': (None,),
  'kasa_config': (None,),
  'monteclora_config': (None,),
}


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
  """A folder of PEFT whose config and headers have been read.

  Attributes:
    folder: where it lies.
    config: the content of adapter_config.json.
    tensors: its A and B, by the name of the module in the base model.
    score: the name of a reward model's score in its file; None: it has none.
  """

  folder: pathlib.Path
  config: Mapping[str, Any]
  tensors: Mapping[str, Mapping[str, tuple[str, Header]]]
  score: str | None = None

  @property
  def scores(self) -> bool:
    """Whether it is a reward model's."""
    return self.config.get('task_type') == _SCORES

  @property
  def base(self) -> str:
    """The checkpoint it was trained on: a folder, or `hf:owner/name[@revision]`.

    Raises CheckpointError for a path where there is none.
    """
    base, revision = str(self.config['base_model_name_or_path']), self.config.get('revision')
    if pathlib.Path(base).is_dir() or base.startswith(HUB):
      return base
    if not _NAME.fullmatch(base):
      raise CheckpointError(
        f'{self.folder / ADAPTER_CONFIG}: base_model_name_or_path={base!r}: there is no such '
        'folder here. Write the one of the model it was trained on, or owner/name of the hub.'
      )
    return f'{HUB}{base}' + (f'@{revision}' if revision else '')

  def scale(self, module: str, rank: int) -> float:
    """The factor on B A: alpha / rank, or with rsLoRA alpha / sqrt(rank)."""
    alpha = self.config.get('lora_alpha', 8)
    patterns = self.config.get('alpha_pattern') or {}
    matching = (own for name, own in patterns.items() if re.match(rf'(.*\.)?({name})$', module))
    alpha = next(matching, alpha)  # PEFT too takes the first
    return alpha / (rank**0.5 if self.config.get('use_rslora') else rank)


def is_adapter(source: str | pathlib.Path) -> bool:
  """Whether a path is a folder of PEFT."""
  return (pathlib.Path(source) / ADAPTER_CONFIG).is_file()


def open_adapter(folder: pathlib.Path) -> PeftAdapter:
  """Reads config and headers.

  Raises:
    CheckpointError: it is no LoRA adapter, or asks for what the decoder does not have.
    DataError: its config is damaged.
  """
  path = folder / ADAPTER_CONFIG
  config = read_json(path)
  _check_config(path, config)
  scores = config.get('task_type') == _SCORES
  if not (folder / ADAPTER).is_file():
    raise CheckpointError(f'{folder}: there is no {ADAPTER}. Save it with safe_serialization=True.')
  score = None
  tensors: dict[str, dict[str, tuple[str, Header]]] = {}
  for name, header in headers_of(folder / ADAPTER):
    if scores and _SCORE.fullmatch(name):
      score = name
      continue
    found = _TENSOR.fullmatch(name)
    if found is None:
      raise CheckpointError(f'{folder / ADAPTER}: {name} is no low-rank matrix of a linear map.')
    tensors.setdefault(found['module'], {})[found['which']] = (name, header)
  if lonely := [module for module, pair in tensors.items() if len(pair) < 2]:
    raise CheckpointError(f'{folder / ADAPTER}: {lonely[0]} has only one of its two matrices.')
  return PeftAdapter(folder, config, tensors, score)


def _check_config(path: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Raises CheckpointError for what is no LoRA adapter, or one that asks for more than that."""
  if config.get('peft_type') != 'LORA':
    raise CheckpointError(f"{path}: peft_type={config.get('peft_type')!r}: expected 'LORA'.")
  if not config.get('base_model_name_or_path'):
    raise CheckpointError(
      f'{path}: base_model_name_or_path is empty: write the folder of the model it was trained on.'
    )
  scores = config.get('task_type') == _SCORES
  for key, allowed in _ONLY.items():
    value = config.get(key)
    heads = value if key == 'modules_to_save' and scores and isinstance(value, list) else [None]
    if all(head in _HEADS for head in heads):
      continue
    if value not in allowed:
      raise CheckpointError(
        f'{path}: {key}={value!r} is not supported, only {allowed[-1]!r}. Merge the adapter '
        'into its model with PEFT (merge_and_unload), and use that.'
      )
  patterns = config.get('alpha_pattern') or {}
  alphas = [
    config.get('lora_alpha', 8),
    *(patterns.values() if isinstance(patterns, dict) else ['']),
  ]
  try:
    for name in patterns:
      re.compile(name)
    usable = not any(isinstance(a, bool) or not isinstance(a, int | float) for a in alphas)
  except (TypeError, re.error):
    usable = False
  if not usable:
    raise CheckpointError(
      f'{path}: lora_alpha={config.get("lora_alpha")!r}, alpha_pattern={patterns!r}: expected a '
      'number, and numbers by regular expressions.'
    )


def read_score(adapter: PeftAdapter, width: int) -> Score | None:
  """A reward model's score on hidden states `[..., width]`; None: it is the base's own.

  Raises CheckpointError unless it is one number.
  """
  from safetensors import safe_open

  if adapter.score is None:
    return None
  with safe_open(adapter.folder / ADAPTER, framework='numpy') as file:
    weight = file.get_tensor(adapter.score).astype(np.float32)
  if weight.shape != (1, width):
    raise CheckpointError(
      f'{adapter.folder / ADAPTER}: {adapter.score} is {list(weight.shape)}, expected '
      f'[1, {width}], of a classifier with one label (num_labels=1).'
    )
  return Score(weight, float(read_json(adapter.folder / OURS).get(SCORE_BIAS, 0.0)))


def add_adapter(adapter: PeftAdapter, checkpoint: Checkpoint, params: Any) -> Any:
  """A decoder's parameters with the adapter merged in: W + scale B A, a map at a time.

  Args:
    adapter: from `open_adapter`.
    checkpoint: the base.
    params: its parameters, which are used up.

  Raises:
    CheckpointError: the base has no such map, or one of another shape.
  """
  from safetensors import safe_open

  leaves = trees.flatten(params)
  where, model = str(adapter.folder / ADAPTER), checkpoint.model
  sources = hf_model.plan(checkpoint.family, model.layers, leaves, where)
  sizes = hf_layout.axis_sizes(model)
  with safe_open(adapter.folder / ADAPTER, framework='numpy') as file:
    for module, pair in adapter.tensors.items():
      name = f'{module}.weight'
      if checkpoint.pictures:
        name = hf_model.text_tensor(name) or name
      pieces = sources.get(name, sources.get(checkpoint.family.prefix + name))
      if pieces is None or pieces[0].layer is None:
        raise CheckpointError(
          f'{where}: {module} is no linear map in a block of {checkpoint.folder}.'
        )
      first, second = (file.get_tensor(pair[which][0]).astype(np.float32) for which in 'AB')
      layout = hf_layout.parse(pieces[0].tensor.layout)
      shape = layout.their_shape(sizes)
      across = _inputs_first(pieces[0])
      inputs, outputs = shape if across else shape[::-1]
      if first.shape[1:] != (inputs,) or second.shape != (outputs, first.shape[0]):
        raise CheckpointError(
          f'{where}: {module} has matrices {list(first.shape)} and {list(second.shape)}, expected '
          f'[rank, {inputs}] and [{outputs}, rank].'
        )
      change = adapter.scale(module, first.shape[0]) * (second @ first)
      change = change.T if across else change
      for piece in pieces:
        leaves[piece.param] = _add(leaves[piece.param], piece, change, sizes)
  return trees.unflatten(params, leaves)


def _add(leaf: jax.Array, piece: Piece, change: np.ndarray, sizes: hf_layout.Sizes) -> jax.Array:
  """Adds what a map's change holds of a parameter, in place."""
  index = tuple(slice(0, size) for size in leaf.shape[1:])
  layout = hf_layout.parse(piece.tensor.layout)
  own = hf_layout.read(layout, sizes, piece.tensor.part, index, lambda part: change[part])
  return _adder(leaf.sharding)(leaf, own, piece.layer)


@functools.lru_cache(maxsize=64)
def _adder(sharding: jax.sharding.Sharding) -> Any:
  def add(stack: jax.Array, change: jax.Array, layer: jax.Array) -> jax.Array:
    return stack.at[layer].add(change)

  return jax.jit(add, donate_argnums=0, out_shardings=sharding)


def _inputs_first(piece: Piece) -> bool:
  """Whether a tensor is [inputs, outputs] (GPT-2), not [outputs, inputs]."""
  return bool(set(_axes(piece)[0]) & set(hf_layout.parse(piece.tensor.layout).theirs[0]))


def _axes(piece: Piece) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """The names of a projection's input and output axes."""
  inputs = PROJECTIONS[_projection(piece.param)].inputs
  ours = hf_layout.parse(piece.tensor.layout).ours
  return ours[:inputs], ours[inputs:]


def _projection(param: str) -> str:
  return param.removesuffix('.kernel').rpartition('.')[2]


def export_adapter(
  target: pathlib.Path,
  family: Family,
  model: ModelConfig,
  config: AdapterConfig,
  trained: Any,
  *,
  base: str,
  score: Score | None = None,
) -> None:
  """Writes what was trained as a folder that `peft.PeftModel.from_pretrained` loads.

  Args:
    target: an existing, empty folder.
    family: of the base.
    model: the decoder.
    config: with method 'lora'.
    trained: the tree of `adapters.init`.
    base: where PEFT is to find the base, a folder or a name of the hub (`hf:`, `@revision`).
    score: that of a reward model; None: of a policy.
  """
  modules = _modules(family, model, config, str(target))
  pairs = trees.flatten(trained)
  entries, ranks = [], {}
  for module, parts in modules.items():
    first, second = _matrices(model, config.rank, parts, pairs)
    kind = re.split(r'\.\d+\.', module)[-1]
    if len(parts) > 1:
      ranks[kind] = len(parts)
    for which, matrix in (('A', first), ('B', second)):
      name = f'{_PREFIX}{module}.lora_{which}.weight'
      entries.append(Entry(name, matrix.shape, 'float32', functools.partial(np.asarray, matrix)))
  if score is not None:
    entries.append(
      Entry(f'{_PREFIX}{SCORE.name}', score.weight.shape, 'float32', lambda: score.weight)
    )
    write_json(target / OURS, {SCORE_BIAS: score.bias})
  write_file(target / ADAPTER, entries)
  base, revision = parse(base) if base.startswith(HUB) else (base, None)
  kinds = sorted({re.split(r'\.\d+\.', module)[-1] for module in modules})
  values = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM' if score is None else _SCORES,
    'modules_to_save': None if score is None else ['score'],
    'base_model_name_or_path': base,
    'revision': revision,
    'r': config.rank,
    'lora_alpha': config.alpha,
    'lora_dropout': config.dropout,
    'target_modules': kinds,
    'rank_pattern': {kind: count * config.rank for kind, count in ranks.items()},
    'alpha_pattern': {kind: count * config.alpha for kind, count in ranks.items()},
    'bias': 'none',
    'fan_in_fan_out': any(_inputs_first(piece) for p in modules.values() for piece in p.values()),
    'inference_mode': True,
  }
  write_json(target / ADAPTER_CONFIG, values)


def _modules(
  family: Family, model: ModelConfig, config: AdapterConfig, where: str
) -> dict[str, dict[str, Piece]]:
  """The linear maps of transformers' model that get matrices, and our projections in each."""
  modules: dict[str, dict[str, Piece]] = {}
  for name in config.projections(model):
    group = f'{PROJECTIONS[name].group}.' if PROJECTIONS[name].group else ''
    param = f'layers.{group}{name}.kernel'
    for module, pieces in hf_model.plan(family, model.layers, [param], where).items():
      modules.setdefault(module.removesuffix('.weight'), {})[name] = pieces[0]
  return modules


def _matrices(
  model: ModelConfig, rank: int, parts: Mapping[str, Piece], pairs: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
  """PEFT's A and B of one linear map, from ours of each projection in it."""
  total = rank * len(parts)
  sizes = hf_layout.axis_sizes(model) | {'r': rank, 'R': total}
  rows, columns = [], {}
  for number, piece in enumerate(parts.values()):
    inputs, outputs = (' '.join(axes) for axes in _axes(piece))
    stem = piece.param.removesuffix('.kernel')
    first, second = (np.asarray(pairs[f'{stem}.lora_{which}'][piece.layer]) for which in 'ab')
    rows.append(hf_layout.join(hf_layout.parse(f'r ({inputs}) -> {inputs} r'), sizes, [first]))
    wide = np.zeros((total, *second.shape[1:]), np.float32)
    wide[number * rank : (number + 1) * rank] = second
    columns[piece.tensor.part] = wide
    theirs = hf_layout.parse(piece.tensor.layout).theirs
    group = next(group for group in theirs if set(group) & set(outputs.split()))
    layout = hf_layout.parse(f'({" ".join(group)}) R -> R {outputs}')
    fused = hf_layout.FUSED in group
  empty = np.zeros_like(wide)
  ordered = [columns.get(part, empty) for part in range(3)] if fused else [wide]
  return np.concatenate(rows), hf_layout.join(layout, sizes, ordered)
