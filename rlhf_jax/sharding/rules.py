"""Which mesh axis each logical axis of a parameter is split over: a table, and its application."""

import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.sharding.mesh import replicated

Array = jax.Array
Rules = tuple[tuple[str, str | None], ...]

# The first row that names a logical axis holds. Weights are cut over 'fsdp' along the residual
# stream and over 'tensor' along what a block computes independently (Megatron-LM: Shoeybi et al.
# 2019).
DEFAULT_RULES: Rules = (
  ('vocab', 'tensor'),
  ('embed', 'fsdp'),
  ('heads', 'tensor'),
  ('kv_heads', 'tensor'),
  ('head_dim', None),
  ('mlp', 'tensor'),
  ('layers', None),
  ('position', None),
)

# Where the sizes of logical axes come from.
_REMEDIES = {
  'vocab': 'set model.vocab_multiple to a multiple of it',
  'embed': 'change model.width',
  'heads': 'change model.heads',
  'kv_heads': 'change model.kv_heads',
  'mlp': 'change model.mlp_width',
}


def param_shardings(axes: Any, shapes: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
  """Shardings of parameters from the logical names of their axes.

  Args:
    axes: tree of tuples with a logical name, or None, for each axis of a parameter.
    shapes: the same tree of arrays or `ShapeDtypeStruct`s.
    mesh: the device mesh.
    rules: (logical axis, mesh axis or None) pairs; an axis without a name is not split.

  Returns:
    the same tree of `NamedSharding`s.

  Raises:
    ConfigError: a logical axis without a rule, a rule whose mesh axis the mesh lacks or that is
      used twice in one parameter, or a size that its mesh axis does not divide. It names the
      parameter.
  """

  def place(path: Any, names: tuple[str | None, ...], leaf: Any) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    return NamedSharding(mesh, _spec(name, names, leaf.shape, mesh, rules))

  return jax.tree_util.tree_map_with_path(
    place, axes, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)
  )


def placed(axes: Any, init: Callable[[Array], Any], mesh: Mesh) -> Any:
  """Shapes, dtypes and shardings of what `init` would make from a key, by its logical axes."""
  abstract = jax.eval_shape(init, jax.random.key(0))
  shardings = param_shardings(axes, abstract, mesh)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    abstract,
    shardings,
  )


def relaid(tree: Any, mesh: Mesh) -> Any:
  """Arrays, or their shapes, over another mesh of the same devices, cut along the same axes.

  What a mesh axis does not divide there is not cut over it.
  """

  def axes(size: int, names: Any) -> Any:
    names = names if isinstance(names, tuple) else (names,)
    whole = names == (None,) or size % math.prod(mesh.shape[name] for name in names)
    return None if whole else names

  def place(leaf: Any) -> NamedSharding:
    spec = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else ()
    return NamedSharding(mesh, PartitionSpec(*map(axes, leaf.shape, spec)))

  shardings = jax.tree.map(place, tree)
  if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)):
    return jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      tree,
      shardings,
    )
  return jax.device_put(tree, shardings)


def opt_state_shardings(
  optimizer: optax.GradientTransformation, params: Any, shardings: Any, mesh: Mesh
) -> Any:
  """Shardings of an optimizer's state: moments lie where their parameters do, the rest everywhere.

  `jax.jit(optimizer.init)` would not inherit them: each moment would be whole on every device.

  Args:
    optimizer: the transformation.
    params: tree of arrays or `ShapeDtypeStruct`s.
    shardings: the same tree of `NamedSharding`s.
    mesh: the device mesh.

  Returns:
    the tree of `optimizer.init(params)` with `NamedSharding`s as leaves.
  """
  state = jax.eval_shape(optimizer.init, params)

  def place(moment: Any, param: Any, sharding: NamedSharding) -> Any:
    if isinstance(moment, optax.MaskedNode):  # a parameter that this transformation leaves alone
      return moment
    # Factored moments (Adafactor) have other shapes than their parameters.
    return sharding if moment.shape == param.shape else replicated(mesh)

  return optax.tree_map_params(
    optimizer,
    place,
    state,
    params,
    shardings,
    transform_non_params=lambda _: replicated(mesh),
    is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
  )


def _spec(
  name: str, axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, rules: Rules
) -> PartitionSpec:
  if len(axes) != len(shape):
    raise ConfigError(
      'mesh', dict(mesh.shape), f'a name for each axis of {name}: it has {axes} for shape {shape}'
    )
  placed = [_mesh_axis(name, axis, mesh, rules) for axis in axes]
  for axis, size, split in zip(axes, shape, placed, strict=True):
    if split is None:
      continue
    if placed.count(split) > 1:
      raise ConfigError(
        f'mesh.{split}',
        mesh.shape[split],
        f'one axis of {name} {axes} to be split over it, not {placed.count(split)}',
        'Change the sharding rules.',
      )
    if size % mesh.shape[split]:
      remedy = _REMEDIES.get(str(axis), f'change the size of axis {axis!r}')
      gcd = math.gcd(size, mesh.shape[split])
      raise ConfigError(
        f'mesh.{split}',
        mesh.shape[split],
        f'a divisor of {size}, the size of axis {axis!r} of parameter {name} {shape}',
        f'Choose mesh.{split}={gcd}, or {remedy} in the stage that makes the decoder.',
      )
  return PartitionSpec(*placed)


def _mesh_axis(name: str, axis: str | None, mesh: Mesh, rules: Rules) -> str | None:
  if axis is None:
    return None
  for logical, split in rules:
    if logical == axis:
      if split is not None and split not in mesh.shape:
        raise ConfigError(
          'mesh',
          dict(mesh.shape),
          f'an axis {split!r}, over which the rules split {axis!r} ({name})',
        )
      return split
  known = ', '.join(logical for logical, _ in rules)
  raise ConfigError(
    'mesh',
    dict(mesh.shape),
    f'a sharding rule for axis {axis!r} of parameter {name}; there are rules for {known}',
    f'Add ({axis!r}, None) to the rules to keep that axis whole.',
  )
