"""The batches that flow between data, rollouts, objectives and models.

Shapes: `B` rows, `P` prompt tokens (left-padded), `R` response tokens (right-padded), and
`[B, 2, ...]` for pairs, index 0 chosen and 1 rejected, so that no split of rows can part a pair.
Anything said of response tokens (log-probs, values, rewards) is `[B, R]`, aligned with the token it
speaks of: `logprobs[b, t] = log p(response[b, t] | prompt[b], response[b, :t])`, and
`values[b, t]` is the value of the state in which `response[b, t]` is chosen.
"""

from typing import Any

from flax import struct

# On the host a numpy array, on devices (and under jit) a jax.Array.
Array = Any


@struct.dataclass
class Prompts:
  """Left-padded prompts.

  Attributes:
    tokens: `[B, P]` int32.
    mask: `[B, P]` bool, True at real tokens; its last column is always True.
    index: `[B]` int32, the number of the prompt in its dataset (seeds the row's sampling).
  """

  tokens: Array
  mask: Array
  index: Array


@struct.dataclass
class Sequences:
  """Prompts with responses: `[..., P]` and `[..., R]`.

  Attributes:
    prompt: int32 tokens, left-padded.
    prompt_mask: bool, True at real tokens; the last column is always True.
    response: int32 tokens, right-padded; the stop token, if any, is the last real one.
    response_mask: bool, True at real tokens, the stop token included. It comes from lengths, never
      from comparing tokens with the padding id.
  """

  prompt: Array
  prompt_mask: Array
  response: Array
  response_mask: Array


@struct.dataclass
class Pairs:
  """Comparisons of two responses.

  Attributes:
    sequences: `[B, 2, ...]`, chosen first.
    preference: `[B]` float32, probability that the first is preferred; 1 is a plain label, 0.5 a
      tie.
    margin: `[B]` float32, how much better the first was said to be; 0 where nobody said.
    reference_logprobs: `[B, 2, R]` float32 per-token log-probs under the frozen reference, or None
      until an objective that needs them has asked for them.
  """

  sequences: Sequences
  preference: Array
  margin: Array
  reference_logprobs: Array | None = None


@struct.dataclass
class Rollouts:
  """Sampled responses with everything an on-policy update needs; arrays are `[B, R]` float32.

  Attributes:
    sequences: the prompts and the sampled responses.
    old_logprobs: log-probs under the policy that sampled.
    reference_logprobs: log-probs under the frozen reference.
    old_values: value estimates before the update.
    advantages: advantage estimates, zero where `response_mask` is False.
    returns: targets of the value function.
    value_mask: `[B, R]` bool, positions at which the value function is trained.
  """

  sequences: Sequences
  old_logprobs: Array
  reference_logprobs: Array
  old_values: Array
  advantages: Array
  returns: Array
  value_mask: Array


@struct.dataclass
class PolicyOutput:
  """What a policy says about given responses; `[B, R]` float32 each.

  Attributes:
    logprobs: log-probs of the response tokens at the sampling temperature.
    entropy: entropy of the distribution each token was drawn from, in nats.
    values: state values, or None for a policy without a value function.
  """

  logprobs: Array
  entropy: Array
  values: Array | None = None
