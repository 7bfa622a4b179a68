"""What the policy-gradient objectives share: surrogates, ratios, and rewards less KL."""

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import check_float, check_shapes
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.masked import masked_sum
from rlhf_jax.common.metrics import FirstMax, Max, Mean, Metrics, Min
from rlhf_jax.common.types import Experience, Rollouts
from rlhf_jax.ops.kl import k1, k2

Array = jax.Array

# Log-ratios are cut here: the gradient of a float32 ratio that overflows is nan even where the
# ratio is clipped away (0 * inf).
MAX_LOG_RATIO = 40.0


def clipped_surrogate(
  logprobs: Array,
  old_logprobs: Array,
  advantages: Array,
  *,
  clip_low: float,
  clip_high: float,
  dual_clip: float = 0.0,
) -> Array:
  """Clipped surrogate (Schulman et al. 2017, eq. 7), to be minimised.

    max(-A min(rho, dual_clip), -A clip(rho, 1 - clip_low, 1 + clip_high))

  with rho = exp(logprobs - old_logprobs).

  Args:
    logprobs: `[B, R]` of tokens, or `[B, 1]` of whole responses.
    old_logprobs: the same under the policy that sampled.
    advantages: the same shape.
    clip_low: how far a ratio may fall.
    clip_high: how far it may rise (more than it may fall in Yu et al. 2025, DAPO).
    dual_clip: where it counts no more even if the advantage is negative, above 1 + clip_high (Ye et
      al. 2020, eq. 5); 0 is none.

  Returns:
    float32 in the same shape.
  """
  check_shapes(
    'logprobs:BR old:BR advantages:BR', logprobs=logprobs, old=old_logprobs, advantages=advantages
  )
  check_float(advantages=advantages)
  ratio = jnp.exp(jnp.minimum(logprobs - old_logprobs, MAX_LOG_RATIO))
  clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
  return jnp.maximum(-advantages * jnp.minimum(ratio, dual_clip or jnp.inf), -advantages * clipped)


def ratio_metrics(
  logprobs: Array, old_logprobs: Array, mask: Array, *, clip_low: float, clip_high: float
) -> Metrics:
  """How far the policy has moved since it sampled; arguments as in `clipped_surrogate`."""
  ratio = jnp.exp(logprobs - old_logprobs)
  clipped = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
  return {
    'clip_fraction': Mean.of(clipped, mask),
    'approximate_kl': Mean.of(k2(logprobs, old_logprobs), mask),
    'ratio': Mean.of(ratio, mask),
    'ratio_max': Max.of(ratio, mask),
    'ratio_min': Min.of(ratio, mask),
    'first_ratio_deviation': FirstMax.of(jnp.abs(ratio - 1), mask),
  }


def log_ratios(experience: Experience) -> Array:
  """k1 of each sampled token, log pi - log pi_ref, `[N, R]` float32; 0 where masked."""
  difference = k1(experience.old_logprobs, experience.reference_logprobs)
  return jnp.where(experience.sequences.response_mask, difference, 0.0)


def sequence_kl(experience: Experience) -> Array:
  """k1 of each response, `[N]` float32, in nats."""
  return masked_sum(log_ratios(experience), experience.sequences.response_mask, axis=-1)


def grouped(values: Array, samples: int) -> Array:
  """`[N]` -> `[N / samples, samples]`: the samples of one prompt in a row."""
  return values.reshape(-1, samples)


def rollouts_of(experience: Experience, advantages: Array) -> Rollouts:
  """Rollouts without a value function; `advantages` is `[N]`, or `[N, R]`."""
  mask = experience.sequences.response_mask
  if advantages.ndim == 1:
    advantages = advantages[:, None]
  return Rollouts(
    sequences=experience.sequences,
    old_logprobs=experience.old_logprobs,
    reference_logprobs=experience.reference_logprobs,
    advantages=jnp.where(mask, advantages, 0.0),
  )


def check_updates(path: str, epochs: int, minibatches: int, clips: dict[str, float]) -> None:
  """Raises ConfigError for passes below 1 and clips that are not above 0."""
  for name, value in (('epochs', epochs), ('minibatches', minibatches)):
    if value < 1:
      raise ConfigError(f'{path}.{name}', value, 'an integer >= 1')
  for name, clip in clips.items():
    if not clip > 0:
      raise ConfigError(f'{path}.{name}', clip, 'a number > 0')


def check_dual_clip(path: str, dual_clip: float, clip_high: float) -> None:
  """Raises ConfigError for a second clip that would take the first one's place."""
  if dual_clip != 0 and not dual_clip > 1 + clip_high:
    raise ConfigError(f'{path}.dual_clip', dual_clip, f'0 (none) or a number > {1 + clip_high}')


def check_samples(path: str, samples: int, why: str) -> None:
  """Raises ConfigError for fewer than two responses to each prompt."""
  if samples < 2:
    raise ConfigError(f'{path}.samples', samples, 'an integer >= 2', why)
