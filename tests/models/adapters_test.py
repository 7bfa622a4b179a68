"""Decoders trained in part: what is frozen, what is trained, and what both make together."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.models import adapters, decoder
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.cache import init_cache
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.layers import Block
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh
from tests.models.architectures import ARCHITECTURES, VOCAB, make_config, make_params, run

ALL = ('query', 'key', 'value', 'out', 'gate', 'up', 'down')
KEY = jax.random.key(3)
TOKENS = jax.random.randint(jax.random.key(1), (2, 7), 0, VOCAB)
MASK = jnp.arange(7) >= jnp.array([0, 2])[:, None]


def lora(**changes: Any) -> AdapterConfig:
  return AdapterConfig(**{'method': 'lora', 'rank': 3, 'alpha': 6.0, 'targets': ALL, **changes})


def parts_of(config: AdapterConfig, model: ModelConfig) -> tuple[Any, Any, Any]:
  """Base, frozen and trained tree, the trained one moved away from where it starts."""
  base = adapters.base_of(config, make_params(model))
  trained = adapters.init(config, model, base, KEY)
  rng = np.random.default_rng(0)
  moved = jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32), trained)
  return base, adapters.frozen_of(config, model, base), moved


def scores(model: ModelConfig, params: Any) -> jax.Array:
  return run(model, params, TOKENS, MASK)


def in_two(model: ModelConfig, params: Any) -> jax.Array:
  """Logits of the tokens after the fourth, read with the first four in a cache."""

  @jax.jit
  def read(params: Any) -> jax.Array:
    params, cache = decoder.decoding_params(model, params), init_cache(model, 2, 7)
    for part in (slice(0, 4), slice(4, None)):
      hidden, cache = decoder.hidden_states(
        model, params, TOKENS[:, part], MASK[:, part], cache=cache
      )
    return decoder.logits(model, params, hidden)

  return read(params)


@pytest.mark.parametrize(
  ('name', 'scan_layers'), [('gpt2', False), ('llama3', True), ('gemma2', False), ('gemma2', True)]
)
def test_joined_equals_merged(name: str, scan_layers: bool) -> None:
  """x W + scale (x A) B is x (W + scale A B), for every projection, with a cache too."""
  model = make_config(name, scan_layers=scan_layers)
  config = lora(targets=ALL if model.gated_mlp else tuple(t for t in ALL if t != 'gate'))
  base, frozen, trained = parts_of(config, model)
  joined = adapters.join(frozen, trained)
  merged = adapters.merge(model, joined)
  assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, base)
  expected = scores(model, merged)
  np.testing.assert_allclose(scores(model, joined), expected, atol=2e-4, rtol=1e-4)
  assert np.abs(expected - scores(model, base)).max() > 0.1
  np.testing.assert_allclose(in_two(model, joined), expected[:, 4:], atol=2e-4, rtol=1e-4)


def test_merged_kernels_are_those_of_the_definition() -> None:
  """W + (alpha / rank) A B, in float64, in every layer and for every target."""
  model = make_config('llama3')
  config = lora(alpha=9.0)
  base, frozen, trained = parts_of(config, model)
  merged = adapters.merge(model, adapters.join(frozen, trained))
  for name in ALL:
    pick = lambda tree, name=name: tree['layers'].get(name, tree['layers'].get('mlp', {}).get(name))  # noqa: E731
    weight, pair = np.asarray(pick(base)['kernel'], np.float64), pick(trained)
    for layer in range(model.layers):
      first, second = (np.asarray(pair[part][layer], np.float64) for part in ('lora_a', 'lora_b'))
      product = first.reshape(-1, 3) @ second.reshape(3, -1)
      expected = weight[layer] + 3.0 * product.reshape(weight[layer].shape)
      np.testing.assert_allclose(pick(merged)['kernel'][layer], expected, atol=1e-5)


@pytest.mark.parametrize('config', [lora(), AdapterConfig(method='last_layers')], ids=str)
def test_nothing_has_changed_at_the_start(config: AdapterConfig) -> None:
  """The start is the base, to the bit: a policy's KL to its reference is exactly 0."""
  model = make_config('llama3')
  base = adapters.base_of(config, make_params(model))
  trained = adapters.init(config, model, base, KEY)
  joined = adapters.join(adapters.frozen_of(config, model, base), trained)
  np.testing.assert_array_equal(scores(model, joined), scores(model, base))


def test_the_base_is_the_reference_at_no_cost() -> None:
  """LoRA's frozen tree holds the very arrays of the base, and constants of a few bytes."""
  model = make_config('llama3')
  base, frozen, _ = parts_of(lora(), model)
  own = {id(leaf) for leaf in jax.tree.leaves(base)}
  more = [leaf for leaf in jax.tree.leaves(frozen) if id(leaf) not in own]
  assert own <= {id(leaf) for leaf in jax.tree.leaves(frozen)}
  assert sum(leaf.nbytes for leaf in more) == len(ALL) * model.layers * 4


def test_about_one_percent_of_a_real_decoder_is_trained() -> None:
  """Llama 2 7B with rank 16 on every projection, by shapes alone (Dettmers et al. 2023)."""
  model = ModelConfig(vocab_size=32000, width=4096, layers=32, heads=32, mlp_width=11008)
  abstract = jax.eval_shape(lambda: decoder.init(model, KEY))
  trained = jax.eval_shape(lambda base: adapters.init(lora(rank=16), model, base, KEY), abstract)
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
  assert count(trained) == 39_976_960  # what PEFT prints for it
  assert 0.005 < count(trained) / count(abstract) < 0.012


@pytest.mark.parametrize(('name', 'scan_layers'), [('gpt2', False), ('llama3', True)])
def test_the_last_layers_are_trained_as_they_would_be_in_the_whole(
  name: str, scan_layers: bool
) -> None:
  """Scores and gradients are those of the whole decoder, cut to what is trained."""
  model = make_config(name, layers=3, scan_layers=scan_layers)
  config = AdapterConfig(method='last_layers', last_layers=2)
  _, frozen, trained = parts_of(config, model)
  merged = adapters.merge(model, adapters.join(frozen, trained))

  def loss(params: Any) -> jax.Array:
    return jnp.square(jax.nn.log_softmax(scores(model, params))).mean()

  whole = jax.jit(jax.value_and_grad(loss))(merged)
  part = jax.jit(jax.value_and_grad(lambda trained: loss(adapters.join(frozen, trained))))(trained)
  np.testing.assert_allclose(part[0], whole[0], rtol=1e-6)
  expected = adapters.base_of(config, whole[1])
  assert part[1].keys() == {'top_layers', 'final_norm'}
  for name, tree in part[1].items():
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-5), tree, expected[name]
    )
  joined = adapters.join(frozen, trained)
  expected_scores = scores(model, merged)[:, 4:]
  np.testing.assert_allclose(in_two(model, joined), expected_scores, atol=2e-5, rtol=1e-5)


def test_only_trained_leaves_have_gradients_and_they_are_the_definition() -> None:
  """dL/dA = scale dL/dW B^T and dL/dB = scale A^T dL/dW, by the chain rule through the merge."""
  model = make_config('llama3')
  _, frozen, trained = parts_of(lora(), model)

  def loss(params: Any) -> jax.Array:
    return jnp.square(jax.nn.log_softmax(scores(model, params))).mean()

  join = functools.partial(adapters.join, frozen)
  joined = jax.jit(jax.grad(lambda trained: loss(join(trained))))(trained)
  merged = jax.jit(jax.grad(lambda trained: loss(adapters.merge(model, join(trained)))))(trained)
  for one, other in zip(jax.tree.leaves(joined), jax.tree.leaves(merged), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5 * max(1.0, float(jnp.abs(other).max())))


def test_dropout_keeps_the_mean_and_needs_a_key() -> None:
  """Without a key nothing is dropped; with keys the mean over many draws is what it is without."""
  model = make_config('default', layers=1)
  config = lora(targets=('value',), dropout=0.25)
  base, frozen, trained = parts_of(config, model)
  joined = adapters.join(frozen, trained)
  kept = adapters.join(adapters.frozen_of(lora(targets=('value',)), model, base), trained)
  np.testing.assert_array_equal(scores(model, joined), scores(model, kept))
  drawn = lambda key: scores(model, adapters.with_dropout({'policy': joined}, key)['policy'])  # noqa: E731
  first, again, other = (drawn(jax.random.key(seed)) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 1e-3
  # The value projection alone is linear in what is dropped.
  layer = jax.tree.map(lambda x: x[0], adapters.with_dropout(joined, KEY)['layers'])
  x = jax.random.normal(KEY, (2, 7, model.width))

  def values(key: jax.Array) -> jax.Array:
    params = {**layer, 'value': {**layer['value'], 'lora_dropout': key}}
    apply: Any = Block(model).apply
    return apply({'params': params}, x, None, method='project')[2]

  draws = jax.jit(jax.vmap(values))(jax.random.split(KEY, 4000))
  whole = jax.tree.map(lambda x: x[0], joined['layers'])
  apply: Any = Block(model).apply
  expected = apply({'params': whole}, x, None, method='project')[2]
  error = np.abs(draws.mean(0) - expected) / (draws.std(0) / 4000**0.5)
  assert error.mean() < 1.2 and error.max() < 6


def test_projections_drop_apart() -> None:
  """Neither projections nor roles nor layers share random numbers."""
  model = make_config('default')
  _, frozen, trained = parts_of(lora(dropout=0.5), model)
  joined = adapters.join(frozen, trained)
  trees = adapters.with_dropout({'policy': joined, 'value_trunk': joined}, KEY)
  keys = [
    tuple(jax.random.key_data(key).tolist())
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees)
    if path[-1].key == 'lora_dropout'
    for key in leaf
  ]
  assert len(keys) == len(set(keys)) == 2 * len(ALL) * model.layers


@pytest.mark.parametrize('config', [lora(), AdapterConfig(method='last_layers')], ids=str)
@pytest.mark.parametrize('name', list(ARCHITECTURES))
def test_every_trained_leaf_has_a_place(name: str, config: AdapterConfig) -> None:
  """Shardings follow the base's: inputs and outputs are cut alike, the rank is not."""
  model = make_config(name)
  if not model.gated_mlp and config.method == 'lora':
    config = dataclasses.replace(config, targets=('query', 'out', 'down'))
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=1), devices=jax.devices()[:4])
  abstract = adapters.abstract(config, model, mesh)
  trained = jax.eval_shape(
    lambda key: adapters.init(
      config, model, adapters.base_of(config, decoder.init(model, key)), key
    ),
    KEY,
  )
  assert jax.tree.map(lambda x: x.shape, abstract) == jax.tree.map(lambda x: x.shape, trained)
  cut = [leaf for leaf in jax.tree.leaves(abstract) if 'fsdp' in tuple(leaf.sharding.spec)]
  assert cut


@pytest.mark.parametrize(
  ('changes', 'field'),
  [
    ({'method': 'qlora'}, 'method'),
    ({'method': 'lora', 'rank': 0}, 'rank'),
    ({'method': 'lora', 'alpha': 0.0}, 'alpha'),
    ({'method': 'lora', 'dropout': 1.0}, 'dropout'),
    ({'method': 'lora', 'targets': ()}, 'targets'),
    ({'method': 'lora', 'targets': ('q_proj',)}, 'targets'),
    ({'method': 'lora', 'targets': ('query', 'query')}, 'targets'),
    ({'method': 'lora', 'targets': ('attention.up*',)}, 'targets'),
    ({'method': 'last_layers', 'last_layers': 0}, 'last_layers'),
    ({'method': 'none', 'rank': 4}, 'rank'),
    ({'method': 'lora', 'last_layers': 2}, 'last_layers'),
    ({'method': 'last_layers', 'dropout': 0.1}, 'dropout'),
  ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], field: str) -> None:
  with pytest.raises(ConfigError) as caught:
    AdapterConfig(**changes).validate('adapter')
  assert caught.value.field == f'adapter.{field}'


@pytest.mark.parametrize(
  ('targets', 'name', 'expected'),
  [
    (('*',), 'default', ALL),
    (('*',), 'gpt2', tuple(name for name in ALL if name != 'gate')),
    (('attention.*', 'up'), 'default', ('query', 'key', 'value', 'out', 'up')),
    (('mlp.*', 'mlp.up', '?e*'), 'gpt2', ('key', 'up', 'down')),
  ],
)
def test_patterns_stand_for_the_projections_that_there_are(
  targets: tuple[str, ...], name: str, expected: tuple[str, ...]
) -> None:
  """Each once, whatever matches it; what is trained is that of the names written out."""
  model, config = make_config(name), lora(targets=targets)
  config.validate('adapter')
  config.check(model, 'adapter')
  assert config.projections(model) == expected
  base = jax.eval_shape(lambda: decoder.init(model, KEY))
  init = functools.partial(adapters.init, model=model, base=base, key=KEY)
  shapes = [jax.eval_shape(lambda c=c: init(c)) for c in (config, lora(targets=expected))]
  assert shapes[0] == shapes[1]
  axes = adapters.logical_axes(config, model)
  ranks = jax.tree.map(len, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
  assert ranks == jax.tree.map(lambda leaf: leaf.ndim, shapes[0])


def test_what_the_decoder_lacks_is_refused() -> None:
  for target in ('gate', 'mlp.g*'):
    with pytest.raises(ConfigError, match=re.escape(f'no {target!r}')):
      lora(targets=('query', target)).check(make_config('gpt2'), 'adapter')
  with pytest.raises(ConfigError, match='fewer than the 2 layers'):
    AdapterConfig(method='last_layers', last_layers=2).check(make_config('default'), 'adapter')
