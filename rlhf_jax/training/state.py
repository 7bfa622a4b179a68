"""Everything a run needs to go on."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from rlhf_jax.common import prng
from rlhf_jax.common.types import Array


@struct.dataclass
class TrainState:
  """The state of a run; with the config and the data it determines everything that follows.

  Attributes:
    step: int32 scalar, iterations of the loop that are done; also the position in the data.
    params: what is trained, by role, e.g. `{'policy': ..., 'value_head': ...}`.
    opt_state: the optimizer's state; it counts updates by itself.
    key: uint32 data of the run's base key.
    carry: what a recipe carries from step to step, e.g. the adaptive KL coefficient.
  """

  step: Array
  params: Any
  opt_state: Any
  key: Array
  carry: dict[str, Array]

  @classmethod
  def create(
    cls, params: Any, optimizer: optax.GradientTransformation, seed: int, carry: dict[str, Array]
  ) -> 'TrainState':
    """The state before the first step."""
    return cls(
      step=jnp.zeros([], jnp.int32),
      params=params,
      opt_state=optimizer.init(params),
      key=jax.random.key_data(prng.base_key(seed)),
      carry=carry,
    )

  def stream(self, stream: prng.Stream) -> Array:
    """The key of a stream at the current step."""
    return prng.stream_key(jax.random.wrap_key_data(self.key), stream, self.step)
