"""Who samples a rollout's responses: what recipes ask of it, and the engine of this process."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from rlhf_jax.common import processes
from rlhf_jax.common.types import Prompts, Sequences
from rlhf_jax.generation.samples import Samples, repeat_prompts, samples_to_sequences
from rlhf_jax.sharding.mesh import Share, batch_sharding, constrain_batch, put_batch
from rlhf_jax.sharding.rules import relaid

Array = jax.Array
Roles = Mapping[str, Any]
Sampler = Callable[[Roles, Prompts, Array], tuple[Sequences, Samples]]


class Generated(NamedTuple):
  """Responses on the mesh; those to one prompt are adjacent.

  Attributes:
    sequences: `[N, P]` prompts and `[N, R]` responses.
    finished: `[N]` bool, whether a stop token ended the response.
    logprobs: `[N, R]` float32, the tokens' log-probs as the sampler saw them, 0 where the mask is
      False; None: it does not say.
  """

  sequences: Sequences
  finished: Array
  logprobs: Array | None


class RolloutEngine(Protocol):
  """Answers prompts by the weights that it was given last."""

  def sync_weights(self, params: Roles, step: int | Array) -> None:
    """Takes the parameters by role of who is to sample, and the step that they are of."""

  def generate(self, prompts: Prompts, key: Array) -> Generated:
    """Answers the prompts `[L, P]` of this process, on the host, each as often as the recipe asks.

    `prompts.index` numbers them in the whole batch, and seeds their draws together with `key`.
    """

  def close(self) -> None:
    """Lets go of what it holds; it may be called at any time, and again."""


class LocalEngine:
  """Samples on the devices that train, on their mesh or on another one of them.

  On another one a copy of the weights lies as that mesh has them while responses are sampled.

  A batch whose prompts are all short is cut to the smallest of a few lengths that holds them: what
  is sampled is the same, with less to read and a smaller cache. Each length is a program of its
  own; what it gives has the whole width again.
  """

  def __init__(
    self,
    sampler: Sampler,
    mesh: jax.sharding.Mesh,
    share: Share,
    lengths: Sequence[int],
    sampling_mesh: jax.sharding.Mesh | None = None,
  ):
    """Compiles nothing yet.

    Args:
      sampler: `(params by role, prompts, key) -> responses`; to be jitted.
      mesh: where they go.
      share: which rows of the batch this process has.
      lengths: of prompts, in columns; the largest is P.
      sampling_mesh: where they are sampled, of the same devices; None: there.
    """
    self._mesh, self._share, self._lengths = mesh, share, sorted(lengths)
    self._sampling_mesh = sampling_mesh
    self._params: Roles | None = None

    def sample(params: Roles, prompts: Prompts, key: Array, length: int) -> Generated:
      rows, columns = prompts.tokens.shape
      start = columns - length
      cut = Prompts(prompts.tokens[:, start:], prompts.mask[:, start:], prompts.index)
      _, samples = sampler(params, cut, key)
      whole = repeat_prompts(prompts, len(samples.tokens) // rows)
      sequences = samples_to_sequences(whole, samples)
      found = Generated(sequences, samples.finished, samples.logprobs)
      return jax.tree.map(constrain_batch, found)

    self._sample = jax.jit(sample, static_argnames='length')

  def sync_weights(self, params: Roles, step: int | Array) -> None:
    """Takes the very arrays: nothing is copied."""
    del step
    self._params = params

  def generate(self, prompts: Prompts, key: Array) -> Generated:
    """Answers the prompts of this process; all processes ask together."""
    assert self._params is not None, 'sync_weights comes first'
    params, length = self._params, self._length(prompts)
    placed = put_batch(prompts, self._mesh, self._share)
    if self._sampling_mesh is None:
      return self._sample(params, placed, key, length=length)
    params, placed, key = relaid((params, placed, key), self._sampling_mesh)
    with jax.set_mesh(self._sampling_mesh):
      found = self._sample(params, placed, key, length=length)
    return jax.device_put(found, batch_sharding(self._mesh))

  def _length(self, prompts: Prompts) -> int:
    """The smallest length that holds the prompts of every process."""
    if len(self._lengths) == 1:
      return self._lengths[0]
    first = int(np.flatnonzero(prompts.mask.any(0))[0])
    longest = max(processes.gather(prompts.mask.shape[1] - first))
    return next(length for length in self._lengths if length >= longest)

  def close(self) -> None:
    """Lets go of the parameters."""
    self._params = None


def bucket_lengths(longest: int, count: int) -> list[int]:
  """So many lengths, or fewer if they coincide: the longest, half of it, a quarter, rounded up."""
  return sorted({-(-longest // 2**halvings) for halvings in range(count)})
