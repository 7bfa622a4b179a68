"""The batches that flow between data, rollouts, objectives and models.

Shapes: `B` rows, `P` prompt tokens (left-padded), `R` response tokens (right-padded), and
`[B, 2, ...]` for pairs, index 0 chosen and 1 rejected, so that no split of rows can part a pair
(whose prompt may be there once, `[B, 1, P]`).
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
class Packing:
  """Where the texts of a batch stand when several of them are read in one row.

  Every `records` rows of the batch, one block after the other, are read in `rows` rows of their
  own, so that devices and microbatches keep whole blocks.

  Attributes:
    row: `[B]` int32, in which of its block's rows a text stands.
    start: `[B]` int32, the column of its first token there.
    records: texts of a block.
    rows: what they are packed into.
    width: columns of such a row.
  """

  row: Array
  start: Array
  records: int = struct.field(pytree_node=False)
  rows: int = struct.field(pytree_node=False)
  width: int = struct.field(pytree_node=False)


@struct.dataclass
class Sequences:
  """Prompts with responses: `[..., P]` and `[..., R]`.

  Responses `[B, K, R]` that answer the same prompt may have it once, `[B, 1, P]`: it is then read
  once for all of them.

  Attributes:
    prompt: int32 tokens, left-padded.
    prompt_mask: bool, True at real tokens; the last column is always True.
    response: int32 tokens, right-padded; the stop token, if any, is the last real one.
    response_mask: bool, True at real tokens, the stop token included. It comes from lengths, never
      from comparing tokens with the padding id.
    loss_mask: bool, True at the response tokens that are imitated, a part of `response_mask`; None
      where those are all. The response of a demonstration may be the rest of a dialogue, several
      turns of both sides: the model attends to every turn (`response_mask`) and is to say the
      assistant's alone (`loss_mask`). So one row, one forward pass, teaches every answer with all
      that was said before it, and nothing that eats other data has to know of turns.
    packing: how the rows of a batch are packed when a model reads them; None: each by itself.
  """

  prompt: Array
  prompt_mask: Array
  response: Array
  response_mask: Array
  loss_mask: Array | None = None
  packing: Packing | None = None

  @property
  def shares_prompts(self) -> bool:
    """Whether the responses of a row have one prompt: `[B, 1, P]` and `[B, K, R]`."""
    return bool(self.prompt.shape[:-1] != self.response.shape[:-1])

  @property
  def imitated(self) -> Array:
    """`[..., R]` bool, the response tokens that supervised objectives learn to say."""
    return self.response_mask if self.loss_mask is None else self.loss_mask


@struct.dataclass
class Pairs:
  """Comparisons of two responses.

  Attributes:
    sequences: `[B, 2, ...]`, chosen first; prompts `[B, 1, P]` where both responses have the same.
    preference: `[B]` float32, probability that the first is preferred; 1 is a plain label, 0.5 a
      tie.
    margin: `[B]` float32, how much better the first was said to be; 0 where nobody said.
    reference_logprobs: `[B, 2, R]` float32 per-token log-probs under the frozen reference, or None
      until an objective that needs them has asked for them.
    imitated_tokens: `[B]` float32, the same number in every row: how many tokens a row of the whole
      batch imitates on average; None until an objective that divides by it has counted.
  """

  sequences: Sequences
  preference: Array
  margin: Array
  reference_logprobs: Array | None = None
  imitated_tokens: Array | None = None


@struct.dataclass
class Ratings:
  """Responses that were scored one by one.

  Attributes:
    sequences: `[B, ...]`.
    score: `[B]` float32, higher is better.
    reference_logprobs: `[B, R]` float32, as in `Pairs`.
  """

  sequences: Sequences
  score: Array
  reference_logprobs: Array | None = None


@struct.dataclass
class Rankings:
  """Several responses to a prompt, in the order of somebody's preference.

  Attributes:
    sequences: `[B, K, ...]`; rows with fewer than K responses repeat their first.
    rank: `[B, K]` int32, 1 the best; equal ranks were not told apart.
    mask: `[B, K]` bool, False at the repetitions.
    reference_logprobs: `[B, K, R]` float32, as in `Pairs`.
  """

  sequences: Sequences
  rank: Array
  mask: Array
  reference_logprobs: Array | None = None


@struct.dataclass
class StepRatings:
  """Responses whose steps were scored one by one.

  Attributes:
    sequences: `[B, ...]`.
    score: `[B, R]` float32, at the last token of each step the score of that step.
    score_mask: `[B, R]` bool, True at the last tokens of steps that were not cut off.
  """

  sequences: Sequences
  score: Array
  score_mask: Array


@struct.dataclass
class Experience:
  """Sampled and scored responses, before an objective has made of them what it learns from.

  Attributes:
    sequences: `[N, ...]`; the samples of one prompt are adjacent, `N = prompts * samples`.
    old_logprobs: `[N, R]` float32 under the policy that sampled, zero where the mask is False.
    reference_logprobs: `[N, R]` float32 under the frozen reference, zero where the mask is False.
    scores: `[N]` float32, one reward a response; it includes `token_rewards`.
    token_rewards: `[N, R]` float32, the part of the reward that is paid token by token, or None.
    values: `[N, R]` float32 value estimates, or None for objectives without a value function.
  """

  sequences: Sequences
  old_logprobs: Array
  reference_logprobs: Array
  scores: Array
  token_rewards: Array | None = None
  values: Array | None = None


@struct.dataclass
class Rollouts:
  """Sampled responses with everything an on-policy update needs; arrays are `[B, R]` float32.

  Attributes:
    sequences: the prompts and the sampled responses.
    old_logprobs: log-probs under the policy that sampled.
    reference_logprobs: log-probs under the frozen reference.
    advantages: advantage estimates, zero where `response_mask` is False.
    old_values: value estimates before the update; None without a value function, as are the rest.
    returns: targets of the value function.
    value_mask: `[B, R]` bool, positions at which the value function is trained.
    value_scale: `[B]` float32, the same number in every row: response tokens over trained positions
      of the whole iteration; None unless an objective weighs its value term by it.
  """

  sequences: Sequences
  old_logprobs: Array
  reference_logprobs: Array
  advantages: Array
  old_values: Array | None = None
  returns: Array | None = None
  value_mask: Array | None = None
  value_scale: Array | None = None


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


@struct.dataclass
class QOutput:
  """What a policy with action values says about given responses; `[B, R]` float32 each.

  The heads see the state in which each response token is chosen. `next_values[b, t]` is the value
  of the state after token t, 0 after the last one of a response.

  Attributes:
    logprobs: log-probs of the response tokens under the policy.
    values: V of each state.
    next_values: V of each next state.
    q: `[2, B, R]`, both Q functions at the response tokens.
    target_q: `[B, R]`, the smaller of the two slow copies of Q at the response tokens; no gradient.
    q_nll: `[2, B, R]`, cross-entropy of the response tokens under softmax(Q); None where actions
      are not tokens.
  """

  logprobs: Array
  values: Array
  next_values: Array
  q: Array
  target_q: Array
  q_nll: Array | None = None
