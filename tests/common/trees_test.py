"""Canonical names of leaves, and a fingerprint that depends on contents alone."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common import trees

TREE = {
  'policy': {'head': np.arange(6, dtype=np.float32).reshape(2, 3), 'bias': np.float32(2)},
  'layers': [np.ones(2, np.int32), np.zeros(1, np.float32)],
}


def test_flatten_gives_sorted_dotted_names() -> None:
  """Dictionaries by key, sequences by number, in order of name."""
  assert list(trees.flatten(TREE)) == ['layers.0', 'layers.1', 'policy.bias', 'policy.head']


def test_unflatten_inverts_flatten() -> None:
  """The same structure with the same leaves."""
  again = trees.unflatten(TREE, trees.flatten(TREE))
  assert str(jax.tree.structure(again)) == str(jax.tree.structure(TREE))
  jax.tree.map(np.testing.assert_array_equal, again, TREE)


def test_sha256_is_what_its_description_says() -> None:
  """Names, dtypes, shapes and little-endian bytes in order of name: built here by hand."""
  tree = {'b': np.array([[1, 2]], np.int32), 'a': np.float32(0.5)}
  digest = hashlib.sha256()
  digest.update(b'a:float32:()\n' + np.array(0.5, '<f4').tobytes())
  digest.update(b'b:int32:(1, 2)\n' + np.array([1, 2], '<i4').tobytes())
  assert trees.sha256(tree) == digest.hexdigest()


def shuffled(tree: Any) -> Any:
  """The same tree with its keys put in in the other order."""
  return {name: tree[name] for name in reversed(tree)}


def spread(tree: Any) -> Any:
  """The same tree on eight devices."""
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return jax.tree.map(lambda leaf: jax.device_put(leaf, everywhere), tree)


@pytest.mark.parametrize(
  'change',
  [
    shuffled,
    spread,
    lambda tree: jax.tree.map(jnp.asarray, tree),
    lambda tree: jax.tree.map(lambda x: np.asarray(x).astype(x.dtype.newbyteorder('>')), tree),
    lambda tree: jax.tree.map(lambda x: np.asfortranarray(x) if x.ndim else x, tree),
  ],
  ids=['key order', 'devices', 'jax arrays', 'byte order', 'memory order'],
)
def test_equal_contents_have_equal_fingerprints(change: Any) -> None:
  """Where and how the numbers are stored does not matter."""
  assert trees.sha256(change(TREE)) == trees.sha256(TREE)


@pytest.mark.parametrize(
  ('first', 'second'),
  [
    ({'a': np.float32(1)}, {'a': np.nextafter(np.float32(1), np.float32(2))}),
    ({'a': np.zeros(2, np.float32)}, {'b': np.zeros(2, np.float32)}),
    ({'a': np.zeros(2, np.float32)}, {'a': np.zeros(2, np.int32)}),
    ({'a': np.zeros((2, 3))}, {'a': np.zeros((3, 2))}),
    ({'a': np.float32(1)}, {'a': np.ones(1, np.float32)}),
    ({'a': np.zeros(2, np.float32)}, {'a': jnp.zeros(4, jnp.bfloat16)}),
  ],
  ids=['one bit', 'name', 'dtype', 'shape', 'scalar or [1]', 'bfloat16'],
)
def test_different_contents_have_different_fingerprints(first: Any, second: Any) -> None:
  """Any difference in bits, names, types or shapes shows."""
  assert trees.sha256(first) != trees.sha256(second)
