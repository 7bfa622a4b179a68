"""What the decoder is used as: a policy, a policy with values, a reward model.

All take `Sequences` with one leading axis `[B, ...]` and speak of response tokens, `[B, R]`, or of
whole responses, `[B]`. Responses `[B, K, R]` that share their prompts `[B, 1, P]` are read behind
one copy of them, and packed texts several in a row: the same numbers, to float error, for less
work. What is said of the former is `[B, K, R]` and `[B, K]`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import check_shapes
from rlhf_jax.common.masked import last_true
from rlhf_jax.common.types import PolicyOutput, Sequences
from rlhf_jax.models import decoder
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import scalar_head, scalar_head_axes, scalar_head_init
from rlhf_jax.models.packing import packed_states
from rlhf_jax.models.readout import decoder_kl, decoder_scores
from rlhf_jax.sharding.rules import placed

Array = jax.Array
Params = dict[str, Any]


def policy_output(
  config: ModelConfig,
  params: Params,
  sequences: Sequences,
  *,
  temperature: float,
  value_head: Params | None = None,
  value_trunk: Params | None = None,
  value_config: ModelConfig | None = None,
) -> PolicyOutput:
  """Log-probs and entropies of the response tokens under the policy at `temperature`, and values.

  Logits are divided by the temperature before the log-softmax, in float32, and are computed for the
  response alone. `values[b, t]` is read at the token before `response[b, t]`: it is the value of
  the state in which that token is chosen.

  Args:
    config: the policy's architecture.
    params: its decoder parameters.
    sequences: prompts `[B, P]` and responses `[B, R]`, or such as share prompts.
    temperature: that at which the responses were or will be sampled; above 0.
    value_head: scalar head of the value function; None: no values.
    value_trunk: decoder parameters of a value function with a trunk of its own; None: the head
      reads the policy's hidden states.
    value_config: architecture of `value_trunk`; None: the policy's.

  Returns:
    arrays like the responses, float32; entries where the response mask is False mean nothing.
  """
  _check_temperature(temperature)
  hidden = response_states(config, params, sequences)
  shape = sequences.response.shape
  scores = decoder_scores(
    config,
    params,
    hidden.reshape(-1, *hidden.shape[-2:]),
    sequences.response.reshape(-1, shape[-1]),
    temperature,
  )
  logprobs, entropies = scores.logprobs.reshape(shape), scores.entropy.reshape(shape)
  if value_head is None:
    return PolicyOutput(logprobs=logprobs, entropy=entropies)
  if value_trunk is not None:
    own = config if value_config is None else value_config
    hidden = response_states(own, value_trunk, sequences)
  values = scalar_head(value_head, hidden)
  return PolicyOutput(logprobs=logprobs, entropy=entropies, values=values)


def response_kl(
  config: ModelConfig,
  params: Params,
  reference: Params,
  sequences: Sequences,
  temperature: float,
) -> Array:
  """`[B, R]` float32 KL(policy || reference) of the next token where each response token stands."""
  _check_temperature(temperature)
  policy, frozen = (
    (tree, response_states(config, tree, sequences)) for tree in (params, reference)
  )
  return decoder_kl(config, policy, frozen, temperature)


def init_reward_model(config: ModelConfig, key: Array) -> Params:
  """A reward model with a trunk of random parameters, float32."""
  trunk_key, head_key = jax.random.split(key)
  return reward_model_from_trunk(config, decoder.init(config, trunk_key), head_key)


def reward_model_from_trunk(config: ModelConfig, trunk: Params, key: Array) -> Params:
  """A reward model on a given trunk: a fresh head, and a normaliser that changes nothing yet.

  The head starts at standard deviation 1 / sqrt(width + 1) (Stiennon et al. 2020). The normaliser's
  `{'gain': [], 'bias': []}` are float32 scalars, kept with the parameters so that a reloaded model
  gives the same rewards.
  """
  return {
    'trunk': trunk,
    'head': scalar_head_init(key, config.width, 'normal'),
    'normalizer': {'gain': jnp.ones(()), 'bias': jnp.zeros(())},
  }


def reward_model_axes(config: ModelConfig) -> Params:
  """Logical axis names of a reward model's parameters."""
  return {
    'trunk': decoder.logical_axes(config),
    'head': scalar_head_axes(),
    'normalizer': {'gain': (), 'bias': ()},
  }


def abstract_reward_model(config: ModelConfig, mesh: jax.sharding.Mesh) -> Params:
  """A reward model's shapes and shardings."""
  return placed(reward_model_axes(config), lambda key: init_reward_model(config, key), mesh)


def token_reward(config: ModelConfig, params: Params, sequences: Sequences) -> Array:
  """A process reward model's score at each response token, `[B, R]` float32.

  The head is read at the token itself, once it has been read by the trunk.
  """
  return scalar_head(params['head'], _states(config, params['trunk'], sequences)[..., 1:, :])


def prompt_states(config: ModelConfig, params: Params, sequences: Sequences) -> Array:
  """`[B, width]` hidden states at the last token of each prompt."""
  hidden, _ = decoder.hidden_states(config, params, sequences.prompt, sequences.prompt_mask)
  return hidden[:, -1]


def reward_score(
  config: ModelConfig, params: Params, sequences: Sequences, *, normalize: bool = True
) -> Array:
  """The reward model's score of each response, `[B]` float32, or `[B, K]`.

  The head is read at the last real token of the response, found from its mask; an empty response is
  read at the end of its prompt. With `normalize` the score is gain * head + bias; gain and bias are
  set from samples, never by gradients.
  """
  hidden = _states(config, params['trunk'], sequences)
  mask = sequences.response_mask
  last = jnp.where(mask.any(-1), 1 + last_true(mask), 0)
  ends = jnp.take_along_axis(hidden, last[..., None, None], axis=-2)[..., 0, :]
  scores = scalar_head(params['head'], ends)
  if not normalize:
    return scores
  gain, bias = (jax.lax.stop_gradient(params['normalizer'][name]) for name in ('gain', 'bias'))
  return gain * scores + bias


def _check_temperature(temperature: float) -> None:
  if not temperature > 0:
    raise ValueError(f'temperature={temperature}: log-probs need a temperature above 0.')


def response_states(config: ModelConfig, params: Params, sequences: Sequences) -> Array:
  """`[B, R, width]` hidden states from which each response token is predicted."""
  # Nothing is predicted from the last response token: it is not read.
  read = dataclasses.replace(
    sequences,
    response=sequences.response[..., :-1],
    response_mask=sequences.response_mask[..., :-1],
  )
  return _states(config, params, read)


def _states(config: ModelConfig, params: Params, sequences: Sequences) -> Array:
  """Hidden states of the last token of each prompt and of all response tokens.

  `[B, 1 + R, width]`; of responses that share their prompts `[B, K, 1 + R, width]`.
  """
  if sequences.shares_prompts:
    return _after_shared_prompts(config, params, sequences)
  check_shapes(
    'prompt:BP prompt_mask:BP response:BR response_mask:BR',
    prompt=sequences.prompt,
    prompt_mask=sequences.prompt_mask,
    response=sequences.response,
    response_mask=sequences.response_mask,
  )
  tokens = jnp.concatenate([sequences.prompt, sequences.response], axis=1)
  mask = jnp.concatenate([sequences.prompt_mask, sequences.response_mask], axis=1)
  first, packing = sequences.prompt.shape[1] - 1, sequences.packing
  # Parts of a block, as when one looks at single rows, are read row by row.
  if packing is not None and tokens.shape[0] % packing.records == 0:
    return packed_states(config, params, tokens, mask, packing, first)
  return decoder.hidden_states(config, params, tokens, mask)[0][:, first:]


def _after_shared_prompts(config: ModelConfig, params: Params, sequences: Sequences) -> Array:
  check_shapes(
    'prompt:B1P prompt_mask:B1P response:BKR response_mask:BKR',
    prompt=sequences.prompt,
    prompt_mask=sequences.prompt_mask,
    response=sequences.response,
    response_mask=sequences.response_mask,
  )
  prompts, responses = decoder.branched_states(
    config,
    params,
    sequences.prompt[:, 0],
    sequences.prompt_mask[:, 0],
    sequences.response,
    sequences.response_mask,
  )
  shape = (*responses.shape[:2], 1, responses.shape[-1])
  ends = jnp.broadcast_to(prompts[:, None, -1:], shape)
  return jnp.concatenate([ends, responses], axis=2)
