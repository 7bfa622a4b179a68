"""Training a part of a decoder: low-rank matrices beside frozen ones, or its last layers.

A decoder that is trained in part is two trees: what is trained, which alone has gradients, an
optimizer state and checkpoints, and what is frozen. `whole` joins them, without arithmetic and
without a copy, into parameters that every function of a decoder takes. The frozen tree of LoRA is
the whole base decoder: the same arrays are the reference.
"""

import dataclasses
import fnmatch
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.models import decoder
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.layers import PROJECTIONS, low_rank_shapes
from rlhf_jax.sharding.rules import placed

Array = jax.Array
Params = dict[str, Any]

# The roles that have a decoder, and where it is in their tree; None: it is all of it.
DECODERS: dict[str, str | None] = {'policy': None, 'value_trunk': None, 'reward_model': 'trunk'}
METHODS = ('none', 'lora', 'last_layers')


@dataclasses.dataclass(kw_only=True)
class AdapterConfig:
  """Which part of the decoders is trained; scalar and Q heads are always trained whole."""

  # 'none': all of the decoder. 'lora': W + (alpha / rank) A B with W frozen (Hu et al. 2022).
  # 'last_layers': its last blocks and the final norm; embeddings and read-out stay.
  method: str = 'none'
  # Columns of A and rows of B ('lora' only; Hu et al. 2022: 1 to 64).
  rank: int = 8
  # Numerator of the factor on A B, which makes learning rates comparable over ranks.
  alpha: float = 16.0
  # The projections that get matrices: 'query', 'key', 'value' and 'out' of the attention, 'gate',
  # 'up' and 'down' of the MLP (Hu et al. 2022: query and value; Dettmers et al. 2023, QLoRA: all).
  # A name with * stands for all that it matches, of names like 'attention.query' and 'mlp.up' too:
  # '*' for all that the decoder has, 'mlp.*' for those of the MLP.
  targets: tuple[str, ...] = ('query', 'value')
  # Probability that an entry of A's input is dropped in updates (PEFT's `lora_dropout`). Samples,
  # scores and evaluations have none.
  dropout: float = 0.0
  # How many blocks are trained ('last_layers' only).
  last_layers: int = 1

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    if self.method not in METHODS:
      raise ConfigError(f'{path}.method', self.method, f'one of {METHODS}')
    read = {'lora': ('rank', 'alpha', 'targets', 'dropout'), 'last_layers': ('last_layers',)}
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name not in ('method', *read.get(self.method, ())) and value != field.default:
        raise ConfigError(
          f'{path}.{field.name}',
          value,
          f'{field.default!r} with {path}.method={self.method!r}, which does not read it',
        )
    for name in ('rank', 'last_layers'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'an integer >= 1')
    if not self.alpha > 0:
      raise ConfigError(f'{path}.alpha', self.alpha, 'a number > 0')
    if not 0 <= self.dropout < 1:
      raise ConfigError(f'{path}.dropout', self.dropout, 'a number in [0, 1)')
    if not self.targets or len(set(self.targets)) < len(self.targets):
      raise ConfigError(f'{path}.targets', self.targets, 'one or more projections, each once')
    for target in self.targets:
      if not any(_matches(name, target) for name in PROJECTIONS):
        raise ConfigError(
          f'{path}.targets',
          self.targets,
          f"names among {', '.join(PROJECTIONS)}, or patterns like 'mlp.*', not {target!r}",
        )

  def projections(self, model: ModelConfig) -> tuple[str, ...]:
    """The projections of a decoder that get matrices."""
    return tuple(
      name for name in _projections(model) if any(_matches(name, target) for target in self.targets)
    )

  def check(self, model: ModelConfig, path: str) -> None:
    """Raises ConfigError if a decoder has no such projections or not so many layers."""
    for target in self.targets if self.method == 'lora' else ():
      if not any(_matches(name, target) for name in _projections(model)):
        raise ConfigError(
          f'{path}.targets', self.targets, f'no {target!r}: the MLP of this decoder has no gate'
        )
    if self.method == 'last_layers' and self.last_layers >= model.layers:
      raise ConfigError(
        f'{path}.last_layers',
        self.last_layers,
        f'fewer than the {model.layers} layers of the decoder',
        f"{path}.method='none' trains all of it.",
      )


def _projections(model: ModelConfig) -> list[str]:
  """Those that a decoder has."""
  return [name for name in PROJECTIONS if name != 'gate' or model.gated_mlp]


def _matches(name: str, target: str) -> bool:
  """Whether a projection is meant by an entry of `AdapterConfig.targets`."""
  whole = f'{PROJECTIONS[name].group or "attention"}.{name}'
  return any(fnmatch.fnmatchcase(each, target) for each in (name, whole))


def base_of(config: AdapterConfig, params: Params) -> Params:
  """A decoder's parameters laid out for training in part.

  What comes back is good for every function of a decoder: it also is the frozen reference.
  """
  if config.method != 'last_layers':
    return params
  cut = jax.tree.leaves(params['layers'])[0].shape[0] - config.last_layers

  def split(layers: Params) -> tuple[Params, Params]:
    return jax.tree.map(lambda x: x[:cut], layers), jax.tree.map(lambda x: x[cut:], layers)

  below, above = jax.jit(split)(params['layers'])
  return {**params, 'layers': below, 'top_layers': above}


def init(config: AdapterConfig, model: ModelConfig, base: Params, key: Array) -> Params:
  """What is trained, at the start: copies of the base, or low-rank matrices that change nothing.

  A is uniform in +-1/sqrt(inputs) and B zero, as in PEFT. Float32.
  """
  if config.method == 'none':
    return jax.tree.map(jnp.copy, base)
  if config.method == 'last_layers':
    return {name: jax.tree.map(jnp.copy, base[name]) for name in _top_names(model)}

  def fill(name: str, key: Array) -> Params:
    shapes = low_rank_shapes(model, name, config.rank)
    first, second = ((model.layers, *shape) for shape in shapes)
    bound = math.prod(first[1:-1]) ** -0.5
    return {
      'lora_a': jax.random.uniform(key, first, minval=-bound, maxval=bound),
      'lora_b': jnp.zeros(second),
    }

  keys = dict(zip(sorted(PROJECTIONS), jax.random.split(key, len(PROJECTIONS)), strict=True))
  return _nest({name: fill(name, keys[name]) for name in config.projections(model)})


def abstract(config: AdapterConfig, model: ModelConfig, mesh: jax.sharding.Mesh) -> Params:
  """Shapes, dtypes and shardings of the tree of `init`."""

  def make(key: Array) -> Params:
    return init(config, model, base_of(config, decoder.init(model, key)), key)

  return placed(logical_axes(config, model), make, mesh)


def logical_axes(config: AdapterConfig, model: ModelConfig) -> Params:
  """Logical axis names of the tree of `init`."""
  axes = decoder.logical_axes(model)
  if config.method == 'none':
    return axes
  if config.method == 'last_layers':
    axes['top_layers'] = axes['layers']
    return {name: axes[name] for name in _top_names(model)}

  def cut(name: str) -> Params:
    group = axes['layers'].get('mlp', {}) if PROJECTIONS[name].group else axes['layers']
    _, *names = group[name]['kernel']
    inputs = PROJECTIONS[name].inputs
    return {
      'lora_a': ('layers', *names[:inputs], None),
      'lora_b': ('layers', None, *names[inputs:]),
    }

  return _nest({name: cut(name) for name in config.projections(model)})


def frozen_of(config: AdapterConfig, model: ModelConfig, base: Params) -> Params:
  """What stays: the arrays of the base, and the constants of its low-rank matrices."""
  if config.method == 'none':
    return {}
  if config.method == 'last_layers':
    return {name: tree for name, tree in base.items() if name not in _top_names(model)}
  constants = {'lora_scale': np.full(model.layers, config.alpha / config.rank, np.float32)}
  if config.dropout:
    constants['lora_rate'] = np.full(model.layers, config.dropout, np.float32)
  return join(base, _nest({name: constants for name in config.projections(model)}))


def join(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
  """Two nested dicts as one; where both have a leaf, the second's."""
  joined = dict(first)
  for name, value in second.items():
    both = isinstance(value, Mapping) and isinstance(joined.get(name), Mapping)
    joined[name] = join(joined[name], value) if both else value
  return joined


def with_dropout(params: dict[str, Any], key: Array) -> dict[str, Any]:
  """Joined trees whose low-rank matrices drop entries of their inputs; others stay as they are.

  Every layer's every projection has random numbers of its own; calls with equal keys drop alike.
  """

  def visit(tree: Any, path: tuple[str, ...]) -> Any:
    if not isinstance(tree, Mapping):
      return tree
    found = {name: visit(value, (*path, name)) for name, value in tree.items()}
    if 'lora_rate' in found:
      own = jax.random.fold_in(key, zlib.crc32('.'.join(path).encode()))
      found['lora_dropout'] = jax.random.split(own, found['lora_rate'].shape[0])
    return found

  return visit(params, ())


def merge(model: ModelConfig, params: Params) -> Params:
  """A joined decoder as one like any other: W + scale A B in the place of W, or the layers stacked.

  The result differs from the joined tree's by rounding alone, some 1e-7 of the weights.
  """
  if 'top_layers' in params:
    params = dict(params)
    above = params.pop('top_layers')
    stack = lambda x, y: jnp.concatenate([x, y])  # noqa: E731
    return {**params, 'layers': jax.tree.map(stack, params['layers'], above)}

  def visit(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
      return tree
    if 'lora_a' not in tree:
      return {name: visit(value) for name, value in tree.items()}
    kernel, first, second = tree['kernel'], tree['lora_a'], tree['lora_b']
    rows = first.reshape(first.shape[0], -1, first.shape[-1])
    columns = second.reshape(*second.shape[:2], -1)
    product = jnp.einsum('lir,lro->lio', rows, columns, precision='highest')
    scale = tree['lora_scale'].reshape(-1, *(1,) * (kernel.ndim - 1))
    merged = {name: value for name, value in tree.items() if not name.startswith('lora_')}
    return {**merged, 'kernel': kernel + scale * product.reshape(kernel.shape)}

  return visit(params)


def _top_names(model: ModelConfig) -> tuple[str, ...]:
  return ('top_layers',) if model.norm_placement == 'post' else ('top_layers', 'final_norm')


def _nest(projections: Mapping[str, Any]) -> Params:
  """Trees by projection, where a decoder's parameters have them."""
  layers: Params = {}
  for name, tree in projections.items():
    group = PROJECTIONS[name].group
    (layers.setdefault(group, {}) if group else layers)[name] = tree
  return {'layers': layers}
