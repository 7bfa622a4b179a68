"""Operations and bytes by arithmetic, against what arrays and the compiler say."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.common.types import Sequences
from rlhf_jax.models import decoder, roles
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.cache import init_cache
from rlhf_jax.planning import arithmetic
from rlhf_jax.planning.arithmetic import Rows
from rlhf_jax.planning.programs import device_bytes
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh
from tests.models.architectures import make_config

WIDE: dict[str, Any] = dict(width=64, mlp_width=192, vocab_size=512)
ROWS = Rows(4, 24, 40)


@pytest.mark.parametrize('name', ['default', 'gpt2', 'qwen2'])
def test_weights_of_a_block_are_those_of_its_matrices(name: str) -> None:
  """Norms and biases are no matrices."""
  config = make_config(name)
  params = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
  leaves = jax.tree_util.tree_leaves_with_path(params['layers'])
  matrices = [leaf for path, leaf in leaves if path[-1].key == 'kernel']
  assert arithmetic.block_weights(config) * config.layers == sum(leaf.size for leaf in matrices)


def sequences(rows: Rows = ROWS) -> Sequences:
  shapes: tuple[tuple[int, ...], ...]
  shapes = ((rows.number, rows.prompt), (rows.number, rows.response))
  if rows.shared > 1:
    shapes = (rows.prompts, 1, rows.prompt), (rows.prompts, rows.shared, rows.response)
  (prompt, prompt_mask), (response, response_mask) = (
    (jax.ShapeDtypeStruct(s, jnp.int32), jax.ShapeDtypeStruct(s, bool)) for s in shapes
  )
  return Sequences(prompt, prompt_mask, response, response_mask)


@pytest.mark.parametrize(('remat', 'shared'), [('none', 1), ('full', 1), ('none', 4)])
def test_operations_are_near_the_count_of_the_compiler(remat: str, shared: int) -> None:
  """Of unrolled layers, which it counts right; it also counts what is no matrix product."""
  config, read = make_config(**WIDE, remat=remat), ROWS._replace(shared=shared)
  params = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))

  def forward(params: Any, rows: Sequences) -> jax.Array:
    return roles.policy_output(config, params, rows, temperature=1.0).logprobs.sum()

  def count(function: Any) -> float:
    costs: Any = jax.jit(function).lower(params, sequences(read)).cost_analysis()
    return float(costs['flops'])

  # Plain attention computes the half that the mask hides.
  own = read.response - 1
  masked = ROWS.length * (ROWS.length - 1) / 2 * ROWS.number
  if shared > 1:
    masked = read.prompts * read.prompt * (read.prompt - 1) / 2
    masked += read.number * own * (own - 1) / 2
  hidden = 4.0 * 64 * config.layers * masked
  reading = arithmetic.forward_flops(config, read) + hidden
  assert reading == pytest.approx(count(forward), rel=0.15) and reading < count(forward)
  repeats = 4 if remat == 'full' else 3
  training = arithmetic.training_flops(config, read) + repeats * hidden
  assert training == pytest.approx(count(jax.grad(forward)), rel=0.15)


def test_a_shared_prompt_is_read_once() -> None:
  """Its tokens, its attention and its scores; responses as ever."""
  config, shared = make_config(**WIDE), ROWS._replace(shared=2)
  prompts = Rows(2, ROWS.prompt, 1)
  flops = [arithmetic.forward_flops(config, rows, scored=False) for rows in (ROWS, shared, prompts)]
  assert flops[0] - flops[1] == flops[2]
  assert arithmetic.sequences_in(sequences(shared), ROWS.prompt) == shared
  mesh = {'data': 1, 'fsdp': 1, 'tensor': 1}
  scores = [
    arithmetic.reading_bytes(config, rows, mesh, plain_attention=True)
    - arithmetic.reading_bytes(config, rows, mesh, plain_attention=False)
    for rows in (ROWS, shared)
  ]
  assert scores[1] < scores[0]


def test_what_is_trained_in_part_takes_less() -> None:
  """LoRA has no gradients of weights; the last of two layers half a backward pass."""
  config = make_config(**WIDE)
  blocks = arithmetic.forward_flops(config, ROWS, scored=False)
  readout = arithmetic.forward_flops(config, ROWS) - blocks
  parts = {
    'none': 3 * blocks + 3 * readout,
    'lora': 2 * blocks + 2 * readout,
    'last_layers': 2 * blocks + 2 * readout,
  }
  for method, expected in parts.items():
    adapter = AdapterConfig(method=method)
    assert arithmetic.training_flops(config, ROWS, adapter) == pytest.approx(expected)


def test_windows_bound_what_is_seen() -> None:
  """Token t of a window of 3 sees min(t + 1, 3) tokens."""
  seen = [min(t + 1, 3) for t in range(ROWS.length)]
  windowed = make_config(window=3, window_pattern='LG')
  plain = make_config()
  full = ROWS.length * (ROWS.length + 1) // 2
  difference = arithmetic.forward_flops(plain, ROWS) - arithmetic.forward_flops(windowed, ROWS)
  assert difference == 4 * ROWS.number * plain.width * (full - sum(seen))


def test_the_cache_is_as_large_as_a_real_one() -> None:
  """On each of eight devices, rows and heads divided."""
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  config = make_config('qwen2', dtype='bfloat16')
  with jax.set_mesh(mesh):
    cache = jax.jit(lambda: init_cache(config, ROWS.number, ROWS.length))()
  expected = device_bytes((cache.keys, cache.values))
  sizes = {name: int(size) for name, size in mesh.shape.items()}
  assert arithmetic.cache_bytes(config, ROWS, sizes) == expected


def test_activations_follow_remat_and_vocabulary_chunks() -> None:
  """'none' keeps most and 'full' only inputs; chunks bound the read-out."""
  mesh = {'data': 1, 'fsdp': 1, 'tensor': 2}

  def bytes_of(**changes: Any) -> arithmetic.Activations:
    config = make_config(**WIDE, layers=6, **changes)
    return arithmetic.activation_bytes(config, ROWS, mesh, plain_attention=True)

  none, dots, full = (bytes_of(remat=remat) for remat in ('none', 'dots', 'full'))
  assert none.saved > dots.saved > full.saved == 6 * 4 * ROWS.length * ROWS.number * 64
  assert none.readout == 3 * 4 * ROWS.number * ROWS.response * 256
  assert bytes_of(vocab_chunk=32).readout == none.readout / 8


def test_reading_takes_one_layer_and_what_is_scored() -> None:
  """However many layers there are; twice for twice the rows, but for the weights."""
  mesh = {'data': 1, 'fsdp': 1, 'tensor': 2}

  def bytes_of(rows: Rows = ROWS, scored: bool = True, plain: bool = True, **changes: Any) -> float:
    config = make_config(**WIDE, **changes)
    return arithmetic.reading_bytes(config, rows, mesh, plain_attention=plain, scored=scored)

  assert bytes_of(layers=6) == bytes_of()
  logits = 3 * 4 * ROWS.number * ROWS.response * 256
  assert bytes_of() - bytes_of(scored=False) == logits
  weights = 2 * arithmetic.block_weights(make_config(**WIDE)) / 2 * 4
  twice = bytes_of(ROWS._replace(number=2 * ROWS.number))
  assert twice - weights == 2 * (bytes_of() - weights)
  assert bytes_of(plain=False) < bytes_of() and bytes_of(dtype='bfloat16') < bytes_of()
