"""What the decoder is used as: a policy, a policy with values, a reward model.

All take `Sequences` with one leading axis `[B, ...]` and speak of response tokens, `[B, R]`, or of
whole responses, `[B]`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import check_shapes
from rlhf_jax.common.masked import last_true
from rlhf_jax.common.types import PolicyOutput, Sequences
from rlhf_jax.models import decoder
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import scalar_head, scalar_head_axes, scalar_head_init
from rlhf_jax.models.readout import decoder_kl, decoder_scores

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
    sequences: prompts `[B, P]` and responses `[B, R]`.
    temperature: that at which the responses were or will be sampled; above 0.
    value_head: scalar head of the value function; None: no values.
    value_trunk: decoder parameters of a value function with a trunk of its own; None: the head
      reads the policy's hidden states.
    value_config: architecture of `value_trunk`; None: the policy's.

  Returns:
    arrays `[B, R]` float32; entries where the response mask is False mean nothing.
  """
  _check_temperature(temperature)
  hidden = response_states(config, params, sequences)

  scores = decoder_scores(config, params, hidden, sequences.response, temperature)
  logprobs, entropies = scores.logprobs, scores.entropy
  if value_head is None:
    return PolicyOutput(logprobs=logprobs, entropy=entropies)
  if value_trunk is not None:
    own = config if value_config is None else value_config
    hidden = response_states(own, value_trunk, sequences)
  values = scalar_head(value_head, hidden)
  return PolicyOutput(logprobs=logprobs, entropy=entropies, values=values)


def response_logits(
  config: ModelConfig, params: Params, sequences: Sequences, temperature: float
) -> Array:
  """`[B, R, V]` float32 logits from which each response token is drawn, over the temperature."""
  _check_temperature(temperature)
  return decoder.logits(config, params, response_states(config, params, sequences)) / temperature


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


def token_reward(config: ModelConfig, params: Params, sequences: Sequences) -> Array:
  """A process reward model's score at each response token, `[B, R]` float32.

  The head is read at the token itself, once it has been read by the trunk.
  """
  tokens, mask = _whole(sequences)
  hidden, _ = decoder.hidden_states(config, params['trunk'], tokens, mask)
  return scalar_head(params['head'], hidden[:, sequences.prompt.shape[1] :])


def prompt_states(config: ModelConfig, params: Params, sequences: Sequences) -> Array:
  """`[B, width]` hidden states at the last token of each prompt."""
  hidden, _ = decoder.hidden_states(config, params, sequences.prompt, sequences.prompt_mask)
  return hidden[:, -1]


def reward_score(
  config: ModelConfig, params: Params, sequences: Sequences, *, normalize: bool = True
) -> Array:
  """The reward model's score of each response, `[B]` float32.

  The head is read at the last real token of the response, found from its mask; an empty response is
  read at the end of its prompt. With `normalize` the score is gain * head + bias; gain and bias are
  set from samples, never by gradients.
  """
  tokens, mask = _whole(sequences)
  hidden, _ = decoder.hidden_states(config, params['trunk'], tokens, mask)
  last = sequences.prompt.shape[1] + last_true(sequences.response_mask)
  last = jnp.where(sequences.response_mask.any(-1), last, sequences.prompt.shape[1] - 1)
  ends = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
  scores = scalar_head(params['head'], ends)
  if not normalize:
    return scores
  gain, bias = (jax.lax.stop_gradient(params['normalizer'][name]) for name in ('gain', 'bias'))
  return gain * scores + bias


def _check_temperature(temperature: float) -> None:
  if not temperature > 0:
    raise ValueError(f'temperature={temperature}: log-probs need a temperature above 0.')


def _whole(sequences: Sequences) -> tuple[Array, Array]:
  check_shapes(
    'prompt:BP prompt_mask:BP response:BR response_mask:BR',
    prompt=sequences.prompt,
    prompt_mask=sequences.prompt_mask,
    response=sequences.response,
    response_mask=sequences.response_mask,
  )
  tokens = jnp.concatenate([sequences.prompt, sequences.response], axis=1)
  mask = jnp.concatenate([sequences.prompt_mask, sequences.response_mask], axis=1)
  return tokens, mask


def response_states(config: ModelConfig, params: Params, sequences: Sequences) -> Array:
  """`[B, R, width]` hidden states from which each response token is predicted."""
  tokens, mask = _whole(sequences)
  # Nothing is predicted from the last response token: it is not read.
  hidden, _ = decoder.hidden_states(config, params, tokens[:, :-1], mask[:, :-1])
  return hidden[:, sequences.prompt.shape[1] - 1 :]
