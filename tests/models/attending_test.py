"""Which attention is chosen where, what is refused, and that a decoder is the same by any."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.models import attending, decoder
from rlhf_jax.ops import attention_kernels
from rlhf_jax.ops.attention import attention
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh
from tests.models.architectures import make_config, make_params, make_tokens

HALF: dict[str, Any] = dict(dtype='bfloat16', head_dim=64)


@pytest.mark.parametrize(
  ('backend', 'changes', 'chosen'),
  [
    ('cpu', HALF, 'xla'),
    ('gpu', HALF, 'cudnn'),
    ('gpu', HALF | dict(dtype='float32'), 'xla'),
    ('gpu', HALF | dict(attention_softcap=5.0), 'xla'),
    ('gpu', HALF | dict(head_dim=260), 'xla'),
    ('tpu', HALF | dict(attention_softcap=5.0), 'splash'),
    ('tpu', dict(head_dim=6), 'xla'),
    ('tpu', HALF | dict(window=4, window_pattern='LG', scan_layers=True), 'xla'),
    ('tpu', HALF | dict(window=4, scan_layers=True), 'splash'),
  ],
)
def test_auto_takes_what_the_backend_has_and_can_compute(
  backend: str, changes: Any, chosen: str
) -> None:
  """'auto' never raises, and what it takes could have been asked for by name."""
  assert attending.resolve(make_config(attention='auto', **changes), backend) == chosen
  assert attending.resolve(make_config(attention=chosen, **changes), backend) == chosen


@pytest.mark.parametrize(
  ('attention', 'backend', 'changes', 'message'),
  [
    ('cudnn', 'cpu', HALF, 'needs an NVIDIA GPU'),
    ('cudnn', 'gpu', dict(head_dim=64), "model.dtype 'bfloat16'"),
    ('cudnn', 'gpu', HALF | dict(attention_softcap=5.0), 'no soft-cap'),
    ('cudnn', 'gpu', HALF | dict(head_dim=6), 'a head width that 8 divides'),
    ('splash', 'gpu', HALF, 'needs a TPU'),
    ('splash', 'tpu', dict(window=4, window_pattern='LG', scan_layers=True), 'all see as far'),
  ],
)
def test_what_cannot_run_is_refused_with_the_reason(
  attention: str, backend: str, changes: Any, message: str
) -> None:
  """Before anything is compiled, naming the field and what runs instead."""
  with pytest.raises(ConfigError, match=message) as error:
    attending.resolve(make_config(attention=attention, **changes), backend)
  assert 'model.attention' in str(error.value)


@pytest.mark.parametrize(('capability', 'widest'), [('8.9', 128), ('9.0', 256), ('10.0', 256)])
def test_wide_heads_need_a_new_gpu(
  capability: str, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  """cuDNN has heads wider than 128 from Hopper on; elsewhere 'auto' is plain attention."""
  gpu = types.SimpleNamespace(compute_capability=capability)
  monkeypatch.setattr(jax, 'devices', lambda: [gpu])
  for size in (128, 136, 256):
    asked = make_config(attention='auto', **HALF | dict(head_dim=size))
    assert attending.resolve(asked, 'gpu') == ('cudnn' if size <= widest else 'xla')
  asked = make_config(attention='cudnn', **HALF | dict(head_dim=widest + 8))
  with pytest.raises(ConfigError, match=f'at most {widest} here, not {widest + 8}'):
    attending.resolve(asked, 'gpu')


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
  """tokamax is an extra."""
  monkeypatch.setattr(attending.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ConfigError, match="the extra 'kernels'"):
    attending.resolve(make_config(attention='tokamax'))


@pytest.mark.slow
def test_a_decoder_by_splash_attention_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
  """At real tokens, padded on both sides, with windows and shared heads; gradients too."""
  interpreted = functools.partial(attention_kernels.splash, interpret=True)
  monkeypatch.setattr(attention_kernels, 'splash', interpreted)
  monkeypatch.setattr(attending, 'objection', lambda *_: None)
  tokens = make_tokens()
  real = jnp.ones(tokens.shape, bool).at[0, :3].set(False).at[1, 10:].set(False)

  def run(kernel: str) -> Any:
    config = make_config('gemma3', kv_heads=2, attention=kernel)

    def total(params: Any) -> Any:
      hidden, _ = decoder.hidden_states(config, params, tokens, real)
      hidden = jnp.where(real[..., None], hidden, 0)
      return jnp.square(hidden).sum(), hidden

    return jax.jit(jax.value_and_grad(total, has_aux=True))(make_params(config))

  (_, hidden), gradients = run('splash')
  (_, expected), expected_gradients = run('xla')
  np.testing.assert_allclose(hidden, expected, atol=1e-4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3),
    gradients,
    expected_gradients,
  )


@pytest.mark.parametrize('rows', [8, 3])
def test_a_kernel_is_mapped_over_rows_and_heads(rows: int) -> None:
  """Each device computes its own part, or all rows where the mesh does not divide them."""
  rng = np.random.default_rng(0)
  query = jnp.asarray(rng.normal(size=(rows, 4, 5, 8)), jnp.float32)
  key = jnp.asarray(rng.normal(size=(rows, 2, 5, 8)), jnp.float32)
  mask = jnp.broadcast_to(jnp.tril(jnp.ones((5, 5), bool)), (rows, 5, 5))
  shapes: list[Any] = []

  def kernel(*arrays: jax.Array) -> jax.Array:
    shapes.append(tuple(x.shape[:2] for x in arrays))
    return attention(*arrays, scale=0.3)

  with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
    mixed = jax.jit(functools.partial(attending.over_mesh, kernel))(query, key, key, mask)
  share = 2 if rows == 8 else 3
  assert shapes == [((share, 2), (share, 1), (share, 1), (share, 5))]
  np.testing.assert_allclose(mixed, attention(query, key, key, mask, scale=0.3), atol=1e-5)
