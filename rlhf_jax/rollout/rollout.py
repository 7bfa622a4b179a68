"""Turns sampled and scored responses into the `Experience` that objectives learn from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.common.masked import masked_sum
from rlhf_jax.common.metrics import Max, Mean, Metrics, Sum
from rlhf_jax.common.rows import map_rows
from rlhf_jax.common.types import Experience, PolicyOutput, Sequences
from rlhf_jax.ops import kl as kl_lib
from rlhf_jax.rollout.config import RolloutConfig
from rlhf_jax.rollout.shaping import handle_missing_stop

Array = jax.Array
# Repetition is of so many tokens in a row.
NGRAM = 4
Policy = Callable[[Any, Sequences], PolicyOutput]
ExactKL = Callable[[Any, Any, Sequences], Array]


class Sampled(NamedTuple):
  """What generation gave, as the rollout needs it.

  Attributes:
    sequences: `[N, P]` prompts and `[N, R]` responses; the samples of one prompt are adjacent.
    sampler_logprobs: `[N, R]` float32, as the sampler saw them; None: it does not say.
    stopped: `[N]` bool, whether each response counts as stopped.
  """

  sequences: Sequences
  sampler_logprobs: Array | None
  stopped: Array


class Scored(NamedTuple):
  """What the rewards say.

  Attributes:
    scores: `[N]` float32.
    token_rewards: `[N, R]` float32, their token-wise part, or None.
    disagreement: `[N]` float32, the standard deviation over an ensemble's members, or None.
    terms: `[N, K]` float32, each reward as it is, before they are weighted and combined; None: the
      scores are the only one.
  """

  scores: Array
  token_rewards: Array | None = None
  disagreement: Array | None = None
  terms: Array | None = None


class Judges(NamedTuple):
  """Apply functions, all at the sampling temperature.

  Attributes:
    policy: `(params, sequences) -> PolicyOutput`, with values where there is a value function.
    reference: `(frozen reference params, sequences) -> PolicyOutput`.
    exact_kl: `(decoder params, frozen reference params, sequences) -> [N, R]`.
  """

  policy: Policy
  reference: Policy
  exact_kl: ExactKL


class Judged(NamedTuple):
  """What the models say of samples, whatever these are paid.

  Attributes:
    logprobs: `[N, R]` float32, the policy's; None: the sampler's own count.
    entropy: `[N, R]` float32, the policy's; None likewise.
    reference_logprobs: `[N, R]` float32.
    values: `[N, R]` float32, or None.
    exact_kl: `[N, R]` float32, or None.
  """

  logprobs: Array | None
  entropy: Array | None
  reference_logprobs: Array
  values: Array | None
  exact_kl: Array | None


def judge(
  config: RolloutConfig,
  judges: Judges,
  params: Any,
  reference: Any,
  sequences: Sequences,
  parts: int = 1,
) -> Judged:
  """Reads samples with all models that their scores do not come from.

  Args:
    config: whose log-probs count, and whether the exact KL is asked for.
    judges: apply functions.
    params: parameters of the policy that sampled, `{'policy': ...}`, and the value function's.
    reference: the frozen reference's decoder parameters.
    sequences: samples.
    parts: in how many parts the models read the samples, to save memory.
  """
  trusted = config.old_logprobs == 'sampler'

  def read(rows: Sequences) -> Judged:
    output = judges.policy(params, rows)
    exact = None
    if config.exact_kl:
      exact = judges.exact_kl(params['policy'], reference, rows)
    return Judged(
      None if trusted else output.logprobs,
      None if trusted else output.entropy,
      judges.reference(reference, rows).logprobs,
      output.values,
      exact,
    )

  return map_rows(read, sequences, parts)


def assemble(
  config: RolloutConfig, sampled: Sampled, judged: Judged, scored: Scored
) -> tuple[Experience, Metrics]:
  """Puts samples, log-probs, values and scores together, and treats missing stops.

  Args:
    config: how samples are scored.
    sampled: responses.
    judged: what the models say of them.
    scored: their rewards, before the treatment of missing stops.

  Returns:
    the experience, and metrics.
  """
  mask = sampled.sequences.response_mask
  logprobs = sampled.sampler_logprobs if judged.logprobs is None else judged.logprobs
  assert logprobs is not None, 'validate() demands an engine that says them'
  experience = Experience(
    sequences=sampled.sequences,
    old_logprobs=jnp.where(mask, logprobs, 0.0),
    reference_logprobs=jnp.where(mask, judged.reference_logprobs, 0.0),
    scores=handle_missing_stop(scored.scores, sampled.stopped, config),
    token_rewards=scored.token_rewards,
    values=judged.values,
  )
  metrics = rollout_metrics(experience, sampled)
  if judged.entropy is None:
    del metrics['sampler_logprob_error']  # of themselves
  else:
    metrics['entropy'] = Mean.of(judged.entropy, mask)
  metrics['nonfinite_rewards'] = Sum((~finite_rewards(scored)).sum())
  if scored.disagreement is not None:
    metrics['reward_disagreement'] = Mean.of(scored.disagreement)
  if judged.exact_kl is not None:
    metrics['exact_kl'] = Mean.of(masked_sum(judged.exact_kl, mask, axis=-1))
  return experience, metrics


def finite_rewards(scored: Scored) -> Array:
  """`[N]` bool, whether all rewards of a response are finite, those that a gate hides too."""
  terms = scored.scores[:, None] if scored.terms is None else scored.terms
  finite = jnp.isfinite(scored.scores) & jnp.isfinite(terms).all(1)
  if scored.token_rewards is not None:
    finite &= jnp.isfinite(scored.token_rewards).all(1)
  return finite


def repetition(sequences: Sequences, size: int = NGRAM) -> tuple[Array, Array]:
  """The share of a response's n-grams that it has said before, `1 - |distinct| / |all|`.

  Welleck et al. 2020 ("Neural text generation with unlikelihood training"), seq-rep-n.

  Returns `[N]` float32 shares, and `[N]` bool, whether a response is long enough to have any.
  """
  response, mask = sequences.response, sequences.response_mask
  count = response.shape[-1] - size + 1
  if count < 1:
    return jnp.zeros(response.shape[:1]), jnp.zeros(response.shape[:1], bool)
  grams = [response[:, start : start + count] for start in range(size)]
  real = mask[:, size - 1 :]  # responses are padded on the right
  # Equal ones come to stand side by side; those of the padding at the end, apart from all others.
  *grams, padding = jax.lax.sort((*grams, (~real).astype(jnp.int32)), num_keys=size + 1)
  same = jnp.ones_like(padding[:, 1:], bool)
  for tokens in (*grams, padding):
    same &= tokens[:, 1:] == tokens[:, :-1]
  repeated = (same & (padding[:, 1:] == 0)).sum(-1)
  total = real.sum(-1)
  return repeated / jnp.maximum(total, 1), total > 0


def rollout_metrics(experience: Experience, sampled: Sampled) -> Metrics:
  """What is worth watching of an iteration's samples; KLs are sums over a response, in nats."""
  mask = experience.sequences.response_mask
  arguments = (experience.old_logprobs, experience.reference_logprobs)
  per_sequence = {
    'kl': masked_sum(kl_lib.k1(*arguments), mask, axis=-1),
    'kl_k3': masked_sum(kl_lib.k3(*arguments), mask, axis=-1),
    'score': experience.scores,
    'length': mask.sum(-1),
    'stopped': sampled.stopped,
  }
  metrics: Metrics = {
    **{name: Mean.of(values) for name, values in per_sequence.items()},
    'repetition': Mean.of(*repetition(sampled.sequences)),
    'tokens': Sum(experience.sequences.prompt_mask.sum() + mask.sum()),
  }
  if sampled.sampler_logprobs is not None:
    error = jnp.abs(sampled.sampler_logprobs - experience.old_logprobs)
    metrics['sampler_logprob_error'] = Max.of(error, mask)
  return metrics
