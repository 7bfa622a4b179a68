"""The decoder computes what its switches say, and nothing depends on how it is computed."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.checks import ShapeError
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.models import decoder
from rlhf_jax.models.cache import init_cache
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.readout import decoder_scores
from tests.models import reference
from tests.models.architectures import (
  ARCHITECTURES,
  COLUMNS,
  ROWS,
  VOCAB,
  make_config,
  make_params,
  make_tokens,
  run,
)

every_architecture = pytest.mark.parametrize('name', ARCHITECTURES)
FULL = jnp.ones((ROWS, COLUMNS), bool)


@every_architecture
def test_equals_the_slow_reference(name: str) -> None:
  """Logits of every architecture are those of the float64 NumPy decoder."""
  config = make_config(name)
  params, tokens = make_params(config), make_tokens()
  wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  expected = [reference.logits(config, wide, row) for row in np.asarray(tokens)]
  actual = run(config, params, tokens, FULL)
  assert actual.dtype == jnp.float32 and actual.shape == (ROWS, COLUMNS, VOCAB)
  np.testing.assert_allclose(actual, expected, atol=2e-4, rtol=2e-4)


@every_architecture
def test_a_token_changes_nothing_before_it(name: str) -> None:
  """Causality: logits before column 5 are the same bits, those from it on are not."""
  config = make_config(name)
  params, tokens = make_params(config), make_tokens()
  changed = tokens.at[:, 5].set((tokens[:, 5] + 1) % VOCAB)
  before, after = run(config, params, tokens, FULL), run(config, params, changed, FULL)
  np.testing.assert_array_equal(before[:, :5], after[:, :5])
  assert np.all(np.abs(before[:, 5:7] - after[:, 5:7]).max(-1) > 1e-4)


@every_architecture
def test_padding_on_either_side_changes_nothing(name: str) -> None:
  """Whatever tokens lie under the padding, and however many there are."""
  config = make_config(name)
  params, tokens = make_params(config), np.array(make_tokens())
  expected = run(config, params, tokens, FULL)
  padded, mask = np.array(make_tokens(seed=7)), np.zeros((ROWS, COLUMNS), bool)
  for row, start in enumerate((3, 6)):  # seven tokens moved right: row 0 is padded on both sides
    padded[row, start : start + 7], mask[row, start : start + 7] = tokens[row, :7], True
  actual = run(config, params, padded, mask)
  for row, start in enumerate((3, 6)):
    np.testing.assert_allclose(actual[row, start : start + 7], expected[row, :7], atol=1e-5)


@pytest.mark.parametrize(
  ('name', 'scan_layers'),
  [
    ('gpt2', False),
    ('gpt2', True),
    ('llama3', False),
    ('gemma2', False),
    ('gemma3', False),
    ('gemma3', True),
  ],
)
def test_cached_decoding_equals_reading_at_once(name: str, scan_layers: bool) -> None:
  """A left-padded prompt, then as many tokens again, then one by one: the same logits."""
  config = make_config(name, scan_layers=scan_layers)
  params, tokens = make_params(config), make_tokens()
  mask = FULL.at[0, :2].set(False)
  expected = run(config, params, tokens, mask)

  @jax.jit
  def step(params: Any, tokens: jax.Array, mask: jax.Array, cache: Any) -> Any:
    hidden, cache = decoder.hidden_states(config, params, tokens, mask, cache=cache)
    return decoder.logits(config, params, hidden), cache

  cache, parts = init_cache(config, ROWS, COLUMNS + 2), []
  for start, end in ((0, 5), (5, 10), (10, 11), (11, 12), (12, 13)):
    scores, cache = step(params, tokens[:, start:end], mask[:, start:end], cache)
    parts.append(scores)
  actual = jnp.concatenate(parts, axis=1)
  assert int(cache.index) == 13 and cache.positions.tolist() == [11, 13]
  np.testing.assert_allclose(actual[mask], expected[mask], atol=1e-5)


def loss_and_gradient(config: ModelConfig, params: Any) -> Any:
  """A loss that depends on all logits, and its gradient."""

  def loss(params: Any) -> jax.Array:
    hidden, _ = decoder.hidden_states(config, params, make_tokens(), FULL)
    return jnp.square(decoder.logits(config, params, hidden)).mean()

  return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(
  ('scan_layers', 'remat'), [(True, 'none'), (False, 'full'), (False, 'dots'), (True, 'full')]
)
def test_how_layers_run_changes_nothing(scan_layers: bool, remat: str) -> None:
  """Scanned, unrolled, rematerialised: one loss, one gradient; windows differ between layers."""
  kind: dict[str, Any] = dict(layers=3, window=3, window_pattern='LG', rotary_local_theta=50.0)
  params = make_params(make_config(**kind))
  expected = loss_and_gradient(make_config(**kind), params)
  config = make_config(**kind, scan_layers=scan_layers, remat=remat)
  actual = loss_and_gradient(config, params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-5), actual, expected
  )


def test_remat_keeps_less() -> None:
  """The policies are real: fewer arrays wait for the backward pass, 'full' fewest."""
  params = make_params(make_config())

  def kept(remat: str) -> int:
    config = make_config(remat=remat)

    def loss(params: Any) -> jax.Array:
      return decoder.hidden_states(config, params, make_tokens(), FULL)[0].sum()

    residuals = jax.eval_shape(lambda: jax.vjp(loss, params)[1])
    return sum(leaf.size for leaf in jax.tree.leaves(residuals))

  assert kept('full') < kept('dots') < kept('none')


@pytest.mark.parametrize('name', ['gpt2', 'neox', 'llama3', 'gemma2', 'gemma3', 'post'])
def test_bfloat16_is_close_to_float32(name: str) -> None:
  """Low precision moves log-probs by little; logits stay float32."""
  config = make_config(name, dtype='bfloat16')
  params, tokens = make_params(config), make_tokens()
  low = run(config, params, tokens, FULL)
  high = run(make_config(name), params, tokens, FULL)
  assert low.dtype == jnp.float32
  difference = np.abs(jax.nn.log_softmax(low) - jax.nn.log_softmax(high))
  assert 0 < difference.max() < 0.15 and difference.mean() < 0.03


def test_grouped_heads_equal_repeated_heads() -> None:
  """A model with shared key heads is one with full heads whose kernels repeat."""
  few = make_config('qwen2')
  many = make_config('qwen2', kv_heads=4)
  params = make_params(few)
  layers = dict(params['layers'])
  for name in ('key', 'value'):
    layers[name] = {
      'kernel': jnp.repeat(layers[name]['kernel'], 2, axis=2),
      'bias': jnp.repeat(layers[name]['bias'], 2, axis=1),
    }
  actual = run(many, params | {'layers': layers}, make_tokens(), FULL)
  np.testing.assert_allclose(actual, run(few, params, make_tokens(), FULL), atol=1e-5)


def test_a_wide_window_is_no_window_and_a_window_of_one_sees_itself() -> None:
  """Of one windowed layer: 13 columns wide it sees everything, 1 wide itself alone."""
  plain = make_config(layers=1)
  params, tokens = make_params(plain), make_tokens()
  wide = run(make_config(layers=1, window=COLUMNS), params, tokens, FULL)
  np.testing.assert_array_equal(wide, run(plain, params, tokens, FULL))
  alone = run(make_config(layers=1, window=1), params, tokens, FULL)
  changed = tokens.at[:, :-1].set(0)
  np.testing.assert_allclose(
    run(make_config(layers=1, window=1), params, changed, FULL)[:, -1], alone[:, -1], atol=1e-6
  )


def test_padding_has_exactly_no_gradient() -> None:
  """Tokens under the mask get gradient 0, not something small."""
  config = make_config('gemma2', tied_embeddings=False)
  params = make_params(config)
  tokens = make_tokens() % (VOCAB - 1)
  mask = FULL.at[0, :3].set(False).at[1, 6:].set(False)
  tokens = jnp.where(mask, tokens, VOCAB - 1)

  def loss(params: Any) -> jax.Array:
    hidden, _ = decoder.hidden_states(config, params, tokens, mask)
    return jnp.where(mask, jnp.square(hidden).sum(-1), 0.0).sum()

  gradient = jax.jit(jax.grad(loss))(params)['embedding']
  assert not np.any(gradient[VOCAB - 1]) and np.any(gradient[: VOCAB - 1])


# For each field an architecture and a value that must show there.
VISIBLE: dict[str, tuple[str, Any]] = {
  'vocab_size': ('default', 23),
  'vocab_multiple': ('default', 8),
  'width': ('default', 32),
  'layers': ('default', 3),
  'heads': ('default', 2),
  'kv_heads': ('default', 2),
  'head_dim': ('default', 8),
  'mlp_width': ('default', 20),
  'activation': ('default', 'gelu'),
  'gated_mlp': ('default', False),
  'norm': ('default', 'layernorm'),
  'norm_placement': ('default', 'sandwich'),
  'norm_epsilon': ('default', 0.1),
  'norm_offset': ('default', True),
  'qk_norm': ('default', True),
  'parallel_residual': ('default', True),
  'positions': ('default', 'learned'),
  'max_length': ('gpt2', 30),
  'rotary_fraction': ('default', 0.5),
  'rotary_theta': ('default', 50.0),
  'rotary_local_theta': ('mistral', 50.0),
  'rotary_scaling': ('llama3', 'linear'),
  'rotary_scaling_factor': ('llama3', 2.0),
  'rotary_low_factor': ('llama3', 2.0),
  'rotary_high_factor': ('llama3', 9.0),
  'rotary_original_length': ('llama3', 32),
  'qkv_bias': ('default', True),
  'out_bias': ('default', True),
  'mlp_bias': ('default', True),
  'tied_embeddings': ('default', True),
  'embedding_scale': ('default', 2.0),
  'query_scale': ('default', 1.0),
  'window': ('default', 3),
  'window_pattern': ('mistral', 'LG'),
  'attention_softcap': ('default', 1.0),
  'logit_softcap': ('default', 1.0),
  'init_std': ('default', 0.5),
  'dtype': ('default', 'bfloat16'),
  'vocab_chunk': ('default', 4),
  'remat': ('default', 'full'),
  'scan_layers': ('default', True),
}


def test_every_field_is_listed() -> None:
  """The list of visible fields has all fields of the config but that which needs an accelerator."""
  assert set(VISIBLE) | {'attention'} == {field.name for field in dataclasses.fields(ModelConfig)}


@functools.cache
def traced(name: str, **changes: Any) -> tuple[str, list[np.ndarray]]:
  """The program from a key to log-probs, and the constants in it."""
  config = make_config(name, **changes)

  def apply(key: jax.Array, tokens: jax.Array) -> jax.Array:
    params = decoder.init(config, key)
    hidden, _ = decoder.hidden_states(config, params, tokens, FULL)
    return decoder_scores(config, params, hidden, tokens).logprobs

  program = jax.make_jaxpr(apply)(jax.random.key(0), make_tokens())
  return str(program), [np.asarray(constant) for constant in program.consts]


@pytest.mark.parametrize('field', VISIBLE)
def test_every_field_is_read(field: str) -> None:
  """Changing any field changes the program; what the change must be is for the tests above."""
  name, value = VISIBLE[field]
  program, constants = traced(name)
  other_program, other_constants = traced(name, **{field: value})
  same_constants = len(constants) == len(other_constants) and all(
    np.array_equal(a, b) for a, b in zip(constants, other_constants, strict=True)
  )
  assert program != other_program or not same_constants


@every_architecture
def test_every_axis_of_every_parameter_is_named(name: str) -> None:
  """`logical_axes` has the tree of `init`, a name an axis, and the stacked layers first."""
  config = make_config(name)
  shapes = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
  sizes = {
    'vocab': config.padded_vocab_size,
    'embed': config.width,
    'heads': config.heads,
    'kv_heads': config.num_kv_heads,
    'head_dim': config.size_per_head,
    'mlp': config.mlp_width,
    'layers': config.layers,
    'position': config.max_length,
  }

  def check(axes: tuple[str, ...], leaf: Any) -> None:
    assert tuple(sizes[axis] for axis in axes) == leaf.shape

  axes = decoder.logical_axes(config)
  jax.tree.map(check, axes, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
  layers = jax.tree.leaves(axes['layers'], is_leaf=lambda leaf: isinstance(leaf, tuple))
  assert all(leaf[0] == 'layers' for leaf in layers)


@pytest.mark.parametrize('tied', [False, True])
def test_rows_added_to_the_vocabulary_are_never_scored(tied: bool) -> None:
  """With a rounded-up table the logits are those of the table without the added rows."""
  plain = make_config(tied_embeddings=tied)
  rounded = make_config(tied_embeddings=tied, vocab_multiple=8)
  params = make_params(rounded)
  assert params['embedding'].shape[0] == 24
  cut = params | {'embedding': params['embedding'][:VOCAB]}
  if not tied:
    cut['unembedding'] = params['unembedding'][:, :VOCAB]
  actual = run(rounded, params, make_tokens(), FULL)
  np.testing.assert_allclose(actual, run(plain, cut, make_tokens(), FULL), atol=1e-6)


def test_initial_scale() -> None:
  """Kernels have fan_in ** -0.5, ends of residual branches 1 / sqrt(2 layers) of that; biases 0."""
  config = make_config('qwen2', width=64, layers=8, mlp_width=96)
  params = jax.jit(lambda key: decoder.init(config, key))(jax.random.key(0))
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
  layers = params['layers']
  branch = (2 * 8) ** -0.5
  assert layers['query']['kernel'].std() == pytest.approx(64**-0.5, rel=0.03)
  assert layers['out']['kernel'].std() == pytest.approx(64**-0.5 * branch, rel=0.03)
  assert layers['mlp']['down']['kernel'].std() == pytest.approx(96**-0.5 * branch, rel=0.03)
  assert not np.any(layers['query']['bias'])
  assert np.all(layers['mlp_norm']['scale'] == 1.0)
  layers_differ = np.diff(layers['query']['kernel'], axis=0)
  assert np.abs(layers_differ).reshape(7, -1).max(1).min() > 0.1


@pytest.mark.parametrize(('name', 'scan_layers'), [('gpt2', False), ('gemma2', True)])
def test_decoding_params_give_the_same_bits(name: str, scan_layers: bool) -> None:
  """Casting once and parting the blocks changes no result, not even in low precision."""
  config = make_config(name, scan_layers=scan_layers, dtype='bfloat16')
  params = make_params(config)
  decoding = decoder.decoding_params(config, params)
  assert decoding['embedding'].dtype == jnp.bfloat16
  assert decoding['final_norm']['scale'].dtype == jnp.float32
  assert isinstance(decoding['layers'], dict if scan_layers else tuple)
  np.testing.assert_array_equal(
    run(config, decoding, make_tokens(), FULL), run(config, params, make_tokens(), FULL)
  )


def test_refuses_what_cannot_be_computed() -> None:
  """Too many columns for the table or the cache, arrays that disagree, an unknown vocabulary."""
  config = make_config('gpt2', max_length=8)
  params = make_params(config)
  with pytest.raises(ConfigError, match=r'model\.max_length=8: expected at least 13'):
    decoder.hidden_states(config, params, make_tokens(), FULL)
  with pytest.raises(ConfigError, match=r'model\.max_length=8: expected at least 13'):
    decoder.hidden_states(
      config, params, make_tokens(ROWS, 3), FULL[:, :3], cache=init_cache(config, ROWS, 13)
    )
  config = make_config()
  params = make_params(config)
  with pytest.raises(ShapeError, match='13 columns do not fit a cache of 12'):
    decoder.hidden_states(config, params, make_tokens(), FULL, cache=init_cache(config, ROWS, 12))
  with pytest.raises(ShapeError, match='mask'):
    decoder.hidden_states(config, params, make_tokens(), FULL[:, 1:])
  with pytest.raises(ConfigError, match='vocab_size'):
    decoder.init(make_config(vocab_size=0), jax.random.key(0))
