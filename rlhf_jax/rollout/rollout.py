"""Turns sampled and scored responses into the `Rollouts` of an update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.common.masked import masked_sum, masked_variance, whiten
from rlhf_jax.common.metrics import Max, Mean, Metrics, Sum
from rlhf_jax.common.types import PolicyOutput, Rollouts, Sequences
from rlhf_jax.objectives.ppo import PPOConfig
from rlhf_jax.ops import kl as kl_lib
from rlhf_jax.ops.advantages import gae
from rlhf_jax.rollout.kl_controller import update_coefficient
from rlhf_jax.rollout.shaping import handle_missing_stop, shape_rewards

Array = jax.Array
Policy = Callable[[Any, Sequences], PolicyOutput]
Logits = Callable[[Any, Sequences], Array]


class Sampled(NamedTuple):
  """What generation gave, as the rollout needs it.

  Attributes:
    sequences: `[B, P]` prompts and `[B, R]` responses.
    sampler_logprobs: `[B, R]` float32, as the sampler saw them.
    stopped: `[B]` bool, whether each response counts as stopped.
  """

  sequences: Sequences
  sampler_logprobs: Array
  stopped: Array


class Judges(NamedTuple):
  """Apply functions, all at the sampling temperature.

  Attributes:
    policy: `(params, sequences) -> PolicyOutput` with values.
    reference: `(frozen reference params, sequences) -> PolicyOutput`.
    logits: `(decoder params, sequences) -> [B, R, V]`, for the exact KL.
  """

  policy: Policy
  reference: Policy
  logits: Logits


def assemble(
  config: PPOConfig,
  judges: Judges,
  params: Any,
  reference: Any,
  coefficient: Array,
  sampled: Sampled,
  scores: Array,
) -> tuple[Rollouts, Array, Metrics]:
  """Adds old and reference log-probs, values, rewards, advantages and returns.

  Args:
    config: the objective's settings.
    judges: apply functions.
    params: trained parameters, `{'policy': ...}` and the value function's.
    reference: the frozen reference's decoder parameters.
    coefficient: float32 scalar, the KL penalty's coefficient for this iteration.
    sampled: responses.
    scores: `[B]` float32, before the treatment of missing stops.

  Returns:
    the rollouts, the coefficient for the next iteration, and metrics.
  """
  sequences = sampled.sequences
  mask = sequences.response_mask
  output = judges.policy(params, sequences)
  assert output.values is not None
  reference_logprobs = judges.reference(reference, sequences).logprobs
  log_ratio = kl_lib.k1(output.logprobs, reference_logprobs)
  scores = handle_missing_stop(scores, sampled.stopped, config)
  shaped = shape_rewards(scores, -coefficient * log_ratio, mask, config)
  advantages, returns = gae(
    shaped.rewards, output.values, shaped.value_mask, gamma=config.gamma, lam=config.lam
  )
  if config.whiten_advantages:
    advantages = whiten(advantages, mask, keep_mean=False)
  rollouts = Rollouts(
    sequences=sequences,
    old_logprobs=output.logprobs,
    reference_logprobs=reference_logprobs,
    old_values=output.values,
    advantages=jnp.where(mask, advantages, 0.0),
    returns=returns,
    value_mask=shaped.value_mask,
  )
  following = next_coefficient(config, coefficient, masked_sum(log_ratio, mask, axis=-1))
  metrics = rollout_metrics(rollouts, sampled, scores, coefficient)
  if config.exact_kl:
    exact = kl_lib.exact_kl(
      judges.logits(params['policy'], sequences), judges.logits(reference, sequences)
    )
    metrics['exact_kl'] = Mean.of(masked_sum(exact, mask, axis=-1))
  return rollouts, following, metrics


def next_coefficient(config: PPOConfig, coefficient: Array, sequence_kl: Array) -> Array:
  """The KL coefficient of the next iteration, given the `[B]` sequence KLs of this one."""
  if config.kl_target == 0:
    return coefficient
  return update_coefficient(
    coefficient,
    sequence_kl.mean(),
    target=config.kl_target,
    horizon=config.kl_horizon,
    sequences=sequence_kl.shape[0],
  )


def rollout_metrics(
  rollouts: Rollouts, sampled: Sampled, scores: Array, coefficient: Array
) -> Metrics:
  """What is worth watching of an iteration's samples; KLs are sums over a response, in nats."""
  mask = rollouts.sequences.response_mask
  arguments = (rollouts.old_logprobs, rollouts.reference_logprobs)
  per_sequence = {
    'kl': masked_sum(kl_lib.k1(*arguments), mask, axis=-1),
    'kl_k3': masked_sum(kl_lib.k3(*arguments), mask, axis=-1),
    'score': scores,
    'length': mask.sum(-1),
    'stopped': sampled.stopped,
  }
  errors = rollouts.returns - rollouts.old_values
  explained = 1 - masked_variance(errors, rollouts.value_mask) / jnp.maximum(
    masked_variance(rollouts.returns, rollouts.value_mask), 1e-8
  )
  return {
    **{name: Mean.of(values) for name, values in per_sequence.items()},
    'kl_coefficient': Mean.of(coefficient),
    'objective': Mean.of(scores - coefficient * per_sequence['kl']),
    'returns': Mean.of(rollouts.returns, rollouts.value_mask),
    'values': Mean.of(rollouts.old_values, rollouts.value_mask),
    'explained_variance': Mean.of(explained),
    'sampler_logprob_error': Max.of(
      jnp.abs(sampled.sampler_logprobs - rollouts.old_logprobs), mask
    ),
    'tokens': Sum(rollouts.sequences.prompt_mask.sum() + mask.sum()),
  }
