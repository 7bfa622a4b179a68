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
    carry: what a recipe carries from step to step, arrays by name, e.g. the adaptive KL
      coefficient; and the memory of the guard against bad updates (`training.health`).
    targets: slow copies of parameters that follow what is trained (target networks), by roles of
      their own, e.g. `{'ilql_target': ...}`. They get no gradient and no optimizer state.
  """

  step: Array
  params: Any
  opt_state: Any
  key: Array
  carry: Any
  targets: dict[str, Any] = struct.field(default_factory=dict)

  @classmethod
  def create(
    cls,
    params: Any,
    optimizer: optax.GradientTransformation,
    seed: int,
    carry: Any,
    targets: dict[str, Any] | None = None,
  ) -> 'TrainState':
    """The state before the first step; raises ValueError if a target has the role of a parameter.

    Targets must be copies: an update that gives its state away may not hold a buffer twice.
    """
    targets = {} if targets is None else targets
    if shared := sorted(targets.keys() & params.keys()):
      raise ValueError(f'Roles of both params and targets: {", ".join(shared)}.')
    return cls(
      step=jnp.zeros([], jnp.int32),
      params=params,
      opt_state=optimizer.init(params),
      key=jax.random.key_data(prng.base_key(seed)),
      carry=carry,
      targets=targets,
    )

  @property
  def by_role(self) -> dict[str, Any]:
    """All parameter trees: what is trained, and its targets."""
    return {**self.params, **self.targets}

  def stream(self, stream: prng.Stream) -> Array:
    """The key of a stream at the current step."""
    return prng.stream_key(jax.random.wrap_key_data(self.key), stream, self.step)
