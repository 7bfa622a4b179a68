"""How a tensor of a checkpoint and a parameter of ours hold the same numbers: axes with names.

A layout is written `'(h k) d -> d h k'`: the tensor has two axes, the first one head after head;
the parameter has three. An axis `3` holds query, key and value of one fused tensor, of which a
parameter is one part. A layout without an arrow is the same on both sides.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.models.config import ModelConfig

FUSED = '3'
# How many numbers are converted at a time.
_BLOCK = 2**22

Sizes = Mapping[str, int]
Slices = tuple[slice, ...]


def axis_sizes(model: ModelConfig) -> dict[str, int]:
  """The sizes of all named axes of a decoder's tensors."""
  return {
    'v': model.vocab_size,
    'p': model.max_length,
    'd': model.width,
    'h': model.heads,
    'g': model.num_kv_heads,
    'k': model.size_per_head,
    'm': model.mlp_width,
    '1': 1,
    FUSED: 3,
  }


class Layout(NamedTuple):
  """The axes of a tensor, each a group of named ones, and those of the parameter."""

  theirs: tuple[tuple[str, ...], ...]
  ours: tuple[str, ...]

  @property
  def flat(self) -> tuple[str, ...]:
    """The names of the tensor's axes, groups taken apart."""
    return tuple(name for group in self.theirs for name in group)

  def their_shape(self, sizes: Sizes) -> tuple[int, ...]:
    """The shape of the tensor."""
    return tuple(math.prod(sizes[name] for name in group) for group in self.theirs)


@functools.cache
def parse(text: str) -> Layout:
  """A layout from its text."""
  left, arrow, right = text.partition('->')
  groups: list[tuple[str, ...]] = []
  inside = False
  for word in left.replace('(', ' ( ').replace(')', ' ) ').split():
    if word == '(':
      inside = True
      groups.append(())
    elif word == ')':
      inside = False
    elif inside:
      groups[-1] = (*groups[-1], word)
    else:
      groups.append((word,))
  flat = tuple(name for group in groups for name in group)
  return Layout(tuple(groups), tuple(right.split()) if arrow else flat)


def read(
  layout: Layout,
  sizes: Sizes,
  part: int,
  index: Slices,
  get: Callable[[Slices], np.ndarray],
) -> np.ndarray:
  """A part of a parameter, float32, out of a tensor that is read a block at a time.

  Args:
    layout: of the tensor.
    sizes: of its axes.
    part: which one of a fused tensor.
    index: which part of the parameter, bounds filled in. What lies beyond the tensor is 0: the
      rows of ids that were added to the vocabulary (`ModelConfig.vocab_multiple`).
    get: reads a part of the tensor.
  """
  out = np.zeros([axis.stop - axis.start for axis in index], np.float32)
  wanted = dict(zip(layout.ours, index, strict=True)) | {FUSED: slice(part, part + 1)}
  lead = layout.theirs[0][0]
  rows = math.prod(layout.their_shape(sizes)) // sizes[lead]
  step = max(1, _BLOCK // rows)
  first, last = wanted[lead].start, min(wanted[lead].stop, sizes[lead])
  for start in range(first, last, step):
    block = wanted | {lead: slice(start, min(start + step, last))}
    values = _read_block(layout, sizes, block, get)
    place = [
      slice(block[name].start - wanted[name].start, block[name].start - wanted[name].start + size)
      for name, size in zip(layout.ours, values.shape, strict=True)
    ]
    out[tuple(place)] = values
  return out


def _read_block(
  layout: Layout, sizes: Sizes, wanted: Mapping[str, slice], get: Callable[[Slices], np.ndarray]
) -> np.ndarray:
  ranges, shape, inner = [], [], []
  for lead, *rest in layout.theirs:
    stride = math.prod(sizes[name] for name in rest)
    start, stop = wanted[lead].start, min(wanted[lead].stop, sizes[lead])
    ranges.append(slice(start * stride, stop * stride))
    shape += [stop - start, *(sizes[name] for name in rest)]
    inner += [slice(None), *(wanted[name] for name in rest)]
  values = get(tuple(ranges)).reshape(shape)[tuple(inner)]
  fused = FUSED in layout.flat
  order = [layout.flat.index(name) for name in ((FUSED,) if fused else ()) + layout.ours]
  values = values.transpose(order)
  return values[0] if fused else values


def join(layout: Layout, sizes: Sizes, parts: Sequence[np.ndarray]) -> np.ndarray:
  """The tensor that holds a parameter, or all three of a fused one; the inverse of `read`."""
  names = layout.ours
  values = parts[0]
  if FUSED in layout.flat:
    names, values = (FUSED, *names), np.stack(parts)
  values = values[tuple(slice(sizes[name]) for name in names)]
  order = [names.index(name) for name in layout.flat]
  return np.ascontiguousarray(values.transpose(order)).reshape(layout.their_shape(sizes))
