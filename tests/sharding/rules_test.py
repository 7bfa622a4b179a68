"""From logical names to shardings, for parameters and for optimizer states."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.models import decoder, roles
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh, replicated
from rlhf_jax.sharding.rules import DEFAULT_RULES, opt_state_shardings, param_shardings
from tests.models.architectures import make_config

MESH = MeshConfig(data=2, fsdp=2, tensor=2)


def shapes_of(**shapes: tuple[int, ...]) -> dict[str, Any]:
  """Abstract float32 parameters."""
  return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def test_each_named_axis_goes_where_its_rule_says() -> None:
  """The first rule of a name holds; axes without a name stay whole."""
  mesh = make_mesh(MESH)
  axes = {'a': ('layers', 'embed', 'heads', None), 'b': {'c': ('vocab', 'embed')}, 'd': ()}
  shapes = shapes_of(a=(3, 4, 2, 5), d=()) | {'b': shapes_of(c=(6, 4))}
  shardings = param_shardings(axes, shapes, mesh)
  assert shardings['a'].spec == PartitionSpec(None, 'fsdp', 'tensor', None)
  assert shardings['b']['c'].spec == PartitionSpec('tensor', 'fsdp')
  assert shardings['d'].is_fully_replicated
  own = param_shardings(axes, shapes, mesh, (('embed', None), *DEFAULT_RULES))
  assert own['a'].spec == PartitionSpec(None, None, 'tensor', None)


def test_every_parameter_of_the_models_has_a_place() -> None:
  """Decoders with every kind of parameter, and reward models, are cut over fsdp and tensor."""
  mesh = make_mesh(MESH)
  for name in ('gpt2', 'qwen2', 'qwen3', 'gemma3'):
    config = make_config(name, vocab_multiple=2)
    shapes = jax.eval_shape(
      lambda config=config: roles.init_reward_model(config, jax.random.key(0))
    )
    shardings = param_shardings(roles.reward_model_axes(config), shapes, mesh)
    kernel = shardings['trunk']['layers']['query']['kernel']
    assert kernel.spec == PartitionSpec(None, 'fsdp', 'tensor', None)
    assert shardings['trunk']['embedding'].spec == PartitionSpec('tensor', 'fsdp')
    assert shardings['normalizer']['gain'].is_fully_replicated


@pytest.mark.parametrize(
  ('changes', 'mesh', 'message'),
  [
    (
      dict(heads=2, kv_heads=1, head_dim=8, vocab_multiple=2),
      MESH,
      r'mesh\.tensor=2: expected a divisor of 1, the size of axis .kv_heads. of parameter '
      r'layers\.key\.kernel .*Choose mesh\.tensor=1, or change model\.kv_heads in the stage that',
    ),
    (
      dict(heads=3, head_dim=4, kv_heads=3, vocab_multiple=2),
      MESH,
      r'divisor of 3, .*(kv_)?heads.* of parameter layers\.(key|query)\.kernel',
    ),
    (
      dict(),
      MESH,
      r'divisor of 19, the size of axis .vocab. of parameter embedding \(19, 16\)\. Choose '
      r'mesh\.tensor=1, or set model\.vocab_multiple to a multiple of it in the stage that makes',
    ),
    (
      dict(width=12, head_dim=4),
      MeshConfig(fsdp=8),
      r'mesh\.fsdp=8: expected a divisor of 12, .*Choose mesh\.fsdp=4, or change model\.width',
    ),
  ],
)
def test_what_the_mesh_does_not_divide_is_refused(
  changes: dict[str, Any], mesh: MeshConfig, message: str
) -> None:
  """The error names the parameter, its axis and size, and both remedies."""
  config = make_config(**changes)
  shapes = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
  with pytest.raises(ConfigError, match=message):
    param_shardings(decoder.logical_axes(config), shapes, make_mesh(mesh))


def test_what_has_no_rule_is_refused() -> None:
  """An unknown name, a mesh axis that does not exist or that is used twice, a missing name."""
  mesh = make_mesh(MESH)
  shapes = shapes_of(w=(4, 4))
  with pytest.raises(ConfigError, match=r"rule for axis 'expert' of parameter w; there are rules"):
    param_shardings({'w': ('expert', None)}, shapes, mesh)
  with pytest.raises(ConfigError, match="an axis 'pipeline', over which the rules split 'embed'"):
    param_shardings({'w': ('embed', None)}, shapes, mesh, (('embed', 'pipeline'),))
  with pytest.raises(ConfigError, match=r'one axis of w .* to be split over it, not 2'):
    param_shardings({'w': ('heads', 'mlp')}, shapes, mesh)
  with pytest.raises(ConfigError, match='a name for each axis of w'):
    param_shardings({'w': ('embed',)}, shapes, mesh)


def test_moments_lie_where_their_parameters_do() -> None:
  """Of a chain with clipping, AdamW and a mask; counts are everywhere; so initialised it stays."""
  mesh = make_mesh(MESH)
  axes = {'w': ('embed', 'mlp'), 'b': ('mlp',)}
  params = {'w': jnp.ones((4, 6)), 'b': jnp.ones(6)}
  shardings = param_shardings(axes, params, mesh)
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(optax.linear_schedule(1.0, 0.0, 10), mask={'w': True, 'b': False}),
    optax.masked(optax.trace(0.9), {'w': True, 'b': False}),
  )
  placed = opt_state_shardings(optimizer, params, shardings, mesh)
  state = jax.jit(optimizer.init, out_shardings=placed)(jax.device_put(params, shardings))
  adam = optax.tree_utils.tree_get_all_with_path(state, 'mu')
  assert [leaf['w'].sharding for _, leaf in adam] == [shardings['w']]
  assert state[1][0].nu['b'].sharding == shardings['b']
  assert state[2].inner_state.trace['w'].sharding == shardings['w']
  assert state[1][0].count.sharding.is_fully_replicated


def test_factored_moments_are_kept_whole() -> None:
  """Adafactor's rows and columns have other shapes than their parameters: they are replicated."""
  mesh = make_mesh(MESH)
  params = {'w': jnp.ones((4, 6))}
  shardings = param_shardings({'w': ('embed', 'mlp')}, params, mesh)
  optimizer = optax.adafactor(1e-3, min_dim_size_to_factor=2)
  placed = opt_state_shardings(optimizer, params, shardings, mesh)
  state = jax.jit(optimizer.init, out_shardings=placed)(jax.device_put(params, shardings))
  factored = optax.tree_utils.tree_get(state, 'v_row')
  assert factored['w'].shape == (4,) and factored['w'].sharding == replicated(mesh)
