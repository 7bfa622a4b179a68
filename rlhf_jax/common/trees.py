"""Pytrees as flat dictionaries with canonical names, and their fingerprint."""

import hashlib
from typing import Any

import jax
import numpy as np

from rlhf_jax.common.processes import host_parts


def flatten(tree: Any) -> dict[str, Any]:
  """The leaves by name, sorted: `{'policy.embedding': ..., 'opt_state.1.mu.policy...': ...}`."""
  leaves = {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  return dict(sorted(leaves.items()))


def unflatten(like: Any, leaves: dict[str, Any]) -> Any:
  """The inverse of `flatten`, in the structure of `like`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: leaves[jax.tree_util.keystr(path, simple=True, separator='.')], like
  )


def sha256(tree: Any) -> str:
  """SHA-256 over names, dtypes, shapes and little-endian bytes of the leaves in order of name.

  The host holds a part of one leaf at a time (`host_parts`). Where arrays span several processes,
  all must ask.
  """
  digest = hashlib.sha256()
  for name, leaf in flatten(tree).items():
    digest.update(f'{name}:{leaf.dtype.name}:{leaf.shape}\n'.encode())
    for part in host_parts(leaf):
      little = np.ascontiguousarray(part, part.dtype.newbyteorder('<'))
      digest.update(little.reshape(-1).view(np.uint8).data)
  return digest.hexdigest()
