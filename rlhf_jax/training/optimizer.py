"""The only place where an optimizer is built."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.common.errors import ConfigError

NAMES = ('adamw', 'rmsprop', 'sgd')
SCHEDULES = ('constant', 'linear', 'cosine')


@dataclasses.dataclass(kw_only=True)
class OptimizerConfig:
  """Optimizer, learning-rate schedule and gradient clipping.

  Schedules count optimizer updates: an iteration of PPO makes epochs x minibatches of them.
  """

  # 'adamw'; 'rmsprop', PyTorch's uncentred one (Rafailov et al. 2023, with b2=0.99 and epsilon
  # 1e-8); 'sgd'.
  name: str = 'adamw'
  # Peak learning rate.
  learning_rate: float = 1e-3
  # After the warm-up: 'constant', 'linear' or 'cosine' decay to final_fraction of the peak.
  schedule: str = 'constant'
  # Updates over which the rate rises linearly from 0 (the first update already moves).
  warmup_updates: int = 0
  # Where the decay ends, as a fraction of the peak.
  final_fraction: float = 0.0
  # Largest global gradient norm; 0 is no clipping.
  clip_norm: float = 1.0
  # Decay rates of the moments, PyTorch's and optax's for Adam; rmsprop uses b2 alone, which PyTorch
  # has at 0.99 there.
  b1: float = 0.9
  b2: float = 0.999
  # Added to the root of the second moment (1e-5 in Ziegler et al. 2019 and Huang et al. 2024).
  epsilon: float = 1e-8
  # adamw only: 'inside', PyTorch's and optax's m_hat / (sqrt(v_hat) + eps), or 'outside',
  # TensorFlow's step_size * m / (sqrt(v) + eps), whose effective epsilon is larger in early updates
  # (Huang et al. 2023, "The N implementation details of RLHF with PPO").
  epsilon_placement: str = 'inside'
  # Decoupled weight decay, adamw only.
  weight_decay: float = 0.0

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    choices = {'name': NAMES, 'schedule': SCHEDULES, 'epsilon_placement': ('inside', 'outside')}
    for name, kinds in choices.items():
      if getattr(self, name) not in kinds:
        raise ConfigError(f'{path}.{name}', getattr(self, name), f'one of {kinds}')
    if not self.learning_rate > 0:
      raise ConfigError(f'{path}.learning_rate', self.learning_rate, 'a number > 0')
    for name in ('warmup_updates', 'clip_norm', 'weight_decay'):
      if not getattr(self, name) >= 0:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'a number >= 0')
    for name in ('b1', 'b2'):
      if not 0 <= getattr(self, name) < 1:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'a number in [0, 1)')
    if not self.epsilon > 0:
      raise ConfigError(f'{path}.epsilon', self.epsilon, 'a number > 0')
    if not 0 <= self.final_fraction <= 1:
      raise ConfigError(f'{path}.final_fraction', self.final_fraction, 'a number in [0, 1]')
    if self.name != 'adamw' and self.weight_decay > 0:
      raise ConfigError(f'{path}.weight_decay', self.weight_decay, f'0 with {self.name!r}')


def learning_rate_schedule(config: OptimizerConfig, total_updates: int) -> optax.Schedule:
  """Learning rate as a function of the number of updates already made."""
  peak, warmup = config.learning_rate, config.warmup_updates
  decay_updates = max(total_updates - warmup, 1)
  if config.schedule == 'linear':
    decay = optax.linear_schedule(peak, peak * config.final_fraction, decay_updates)
  elif config.schedule == 'cosine':
    decay = optax.cosine_decay_schedule(peak, decay_updates, config.final_fraction)
  else:
    decay = optax.constant_schedule(peak)
  if not warmup:
    return decay
  rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
  return optax.join_schedules([rise, decay], [warmup])


def scale_by_adam_epsilon_outside(
  b1: float, b2: float, epsilon: float
) -> optax.GradientTransformation:
  """Adam as in TensorFlow 1: `sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + epsilon)`.

  Kingma & Ba 2015, the paragraph before section 2.1 ("epsilon hat").
  """

  def init(params: Any) -> optax.ScaleByAdamState:
    return optax.ScaleByAdamState(
      count=jnp.zeros([], jnp.int32),
      mu=optax.tree.zeros_like(params),
      nu=optax.tree.zeros_like(params),
    )

  def update(
    updates: Any, state: optax.ScaleByAdamState, params: Any = None
  ) -> tuple[Any, optax.ScaleByAdamState]:
    del params
    count = optax.safe_increment(state.count)
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
    nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, updates)
    scale = jnp.sqrt(1 - b2**count) / (1 - b1**count)
    scaled = jax.tree.map(lambda m, v: scale * m / (jnp.sqrt(v) + epsilon), mu, nu)
    return scaled, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

  return optax.GradientTransformation(init, update)


def make_optimizer(config: OptimizerConfig, total_updates: int) -> optax.GradientTransformation:
  """Clipping, then the named optimizer, then decoupled weight decay, then the learning rate."""
  parts = []
  if config.clip_norm > 0:
    parts.append(optax.clip_by_global_norm(config.clip_norm))
  if config.name == 'adamw' and config.epsilon_placement == 'outside':
    parts.append(scale_by_adam_epsilon_outside(config.b1, config.b2, config.epsilon))
  elif config.name == 'adamw':
    parts.append(optax.scale_by_adam(config.b1, config.b2, config.epsilon))
  elif config.name == 'rmsprop':
    # PyTorch's RMSprop, which the DPO authors used, has its epsilon outside the root.
    parts.append(optax.scale_by_rms(config.b2, config.epsilon, eps_in_sqrt=False))
  if config.weight_decay > 0:
    parts.append(optax.add_decayed_weights(config.weight_decay, mask=_decayed))
  parts.append(optax.scale_by_learning_rate(learning_rate_schedule(config, total_updates)))
  return optax.chain(*parts)


def _decayed(params: Any) -> Any:
  """Everything but a reward model's normaliser, which no gradient moves and no decay may."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: not any(getattr(key, 'key', None) == 'normalizer' for key in path), params
  )
