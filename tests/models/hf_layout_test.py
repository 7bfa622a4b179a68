"""Tensors are read by parts and joined again without a number out of place."""

import numpy as np
import pytest

from rlhf_jax.models import hf_layout
from rlhf_jax.models.config import ModelConfig

MODEL = ModelConfig(vocab_size=11, width=6, heads=4, kv_heads=2, head_dim=3, mlp_width=5)
SIZES = hf_layout.axis_sizes(MODEL)

LAYOUTS = ('v d', 'v d -> d v', '(h k) d -> d h k', 'd (h k) -> h k d', '(g k) -> g k')


@pytest.mark.parametrize('text', LAYOUTS)
@pytest.mark.parametrize('block', [1, 2**22])
def test_any_part_of_a_parameter(text: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
  """A part read by itself is that part of the whole, and `join` gives the tensor back."""
  monkeypatch.setattr(hf_layout, '_BLOCK', block)
  layout = hf_layout.parse(text)
  tensor = np.random.default_rng(0).normal(size=layout.their_shape(SIZES)).astype(np.float32)
  shape = [SIZES[name] for name in layout.ours]
  full = tuple(slice(0, size) for size in shape)
  whole = hf_layout.read(layout, SIZES, 0, full, tensor.__getitem__)
  half = tuple(slice(size // 2, size) for size in shape)
  part = hf_layout.read(layout, SIZES, 0, half, tensor.__getitem__)
  np.testing.assert_array_equal(part, whole[half])
  np.testing.assert_array_equal(hf_layout.join(layout, SIZES, [whole]), tensor)


def test_a_linear_map_keeps_its_meaning() -> None:
  """x @ W.T of a [outputs, inputs] matrix is the einsum of the parameter, head by head."""
  weight, x = np.random.default_rng(0).normal(size=(12, 6)), np.arange(6.0)
  full = tuple(slice(0, size) for size in (6, 4, 3))
  layout = hf_layout.parse('(h k) d -> d h k')
  kernel = hf_layout.read(layout, SIZES, 0, full, weight.__getitem__)
  expected = (weight @ x).reshape(4, 3)
  np.testing.assert_allclose(np.einsum('d,dhk->hk', x, kernel), expected, rtol=1e-6)


@pytest.mark.parametrize('text', ['(h 3 k) d -> d h k', 'd (3 h k) -> d h k', '(3 h k) -> h k'])
def test_fused_tensors(text: str) -> None:
  """Query, key and value come out of one tensor, and go back into it."""
  layout = hf_layout.parse(text)
  tensor = np.random.default_rng(0).normal(size=layout.their_shape(SIZES)).astype(np.float32)
  full = tuple(slice(0, SIZES[name]) for name in layout.ours)
  parts = [hf_layout.read(layout, SIZES, i, full, tensor.__getitem__) for i in range(3)]
  assert len({part.tobytes() for part in parts}) == 3
  np.testing.assert_array_equal(hf_layout.join(layout, SIZES, parts), tensor)


def test_added_rows_of_the_vocabulary_are_zero() -> None:
  """They are beyond the tensor, and are left out of it again."""
  layout = hf_layout.parse('v d -> d v')
  tensor = np.ones((11, 6), np.float32)
  whole = hf_layout.read(layout, SIZES, 0, (slice(0, 6), slice(8, 16)), tensor.__getitem__)
  assert whole.shape == (6, 8) and whole[:, :3].all() and not whole[:, 3:].any()
  padded = np.pad(tensor.T, ((0, 0), (0, 5)))
  np.testing.assert_array_equal(hf_layout.join(layout, SIZES, [padded]), tensor)
