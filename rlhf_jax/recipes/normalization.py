"""Sets a reward model's gain and bias, which are kept among its parameters."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.common import prng
from rlhf_jax.common.processes import to_host
from rlhf_jax.common.types import Array, Sequences
from rlhf_jax.data import pipeline
from rlhf_jax.models import roles
from rlhf_jax.objectives import demands_of
from rlhf_jax.recipes.parts import Parts, init_decoder
from rlhf_jax.recipes.probes import device_batches, prompt_columns, sample_scores


def normalizer(parts: Parts, params: Any) -> Any:
  """A reward model's gain and bias as its objective's `normalization` says.

  'policy_samples': gain 1 / std and bias -mean / std over responses of the initial policy (Ziegler
  et al. 2019); 'demonstrations': gain 1 and bias -mean over training demonstrations (Huang et al.
  2024).
  """
  kind, count = demands_of(parts.config.objective).normalization
  if kind == 'none':
    return params['normalizer']

  @jax.jit
  def raw(params: Any, rows: Sequences) -> Array:
    return roles.reward_score(parts.model, params, rows, normalize=False)

  if kind == 'policy_samples':
    columns = prompt_columns(parts, 'train', count)
    key = prng.stream_key(prng.base_key(parts.config.seed), prng.Stream.NORMALIZATION)
    rounds = math.ceil(count / len(columns))
    trunk = parts.reference if 'policy' in parts.parents else init_decoder(parts)
    policy = {'policy': trunk}
    scores = sample_scores(parts, lambda rows: raw(params, rows), policy, key, columns, rounds)
    scores = scores.ravel()[:count]
    gain = 1.0 / max(float(scores.std()), 1e-6)
  else:
    records = parts.feedback.require('train', 'demonstrations')[:count]
    columns = pipeline.encode_demonstrations(records, parts.tokenizer, parts.config.data)
    rows = [to_host(raw(params, batch))[real] for batch, real in device_batches(parts, columns)]
    scores = np.concatenate(rows).astype(np.float64)
    gain = 1.0
  values = {'gain': gain, 'bias': -gain * float(scores.mean())}
  return {
    name: jax.device_put(jnp.asarray(value, jnp.float32), params['normalizer'][name].sharding)
    for name, value in values.items()
  }
