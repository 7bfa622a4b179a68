"""Small ragged batches of every kind that an objective eats, and what may be done to them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.common.types import Pairs, Rankings, Ratings, Rollouts, Sequences, StepRatings
from rlhf_jax.objectives import ObjectiveConfig, objective_of
from rlhf_jax.objectives.imitation import as_responses
from rlhf_jax.objectives.kto import ReferencedRatings
from rlhf_jax.objectives.orpo import ORPOConfig

VOCAB, P, R, B, K = 5, 3, 4, 4, 3
LENGTHS = ((4, 2, 3), (1, 3, 4), (3, 4, 2), (2, 1, 1))
SHAPES = {'comparisons': (B, 2), 'online_pairs': (B, 2), 'rankings': (B, K)}
# What the losses of objectives eat that learn from their own samples, or prepare their batches.
OF_OBJECTIVE = {
  'kto': 'referenced_ratings',
  'ppo': 'valued_rollouts',
  'online_dpo': 'online_pairs',
  'best_of_n': 'demonstrations',
  'tilted_bc': 'ratings',
}


def kind_of(config: ObjectiveConfig) -> str:
  """The kind of batch that a config's loss eats."""
  objective = objective_of(config)
  return OF_OBJECTIVE.get(
    objective.name, 'rollouts' if objective.data == 'prompts' else objective.data
  )


def make_sequences(rng: np.random.Generator, shape: tuple[int, ...]) -> Sequences:
  """Random prompts of 1-3 tokens, responses of the lengths above; `shape` (B,), (B, 2), (B, K)."""
  lengths = np.array(LENGTHS)[:, 0] if len(shape) == 1 else np.array(LENGTHS)[:, : shape[1]]
  prompt_lengths = np.arange(B).reshape((B,) + (1,) * (len(shape) - 1)) % P + 1
  prompt_mask = np.broadcast_to(np.arange(P) >= P - prompt_lengths[..., None], (*shape, P))
  return Sequences(
    prompt=rng.integers(0, VOCAB, (*shape, P)),
    prompt_mask=prompt_mask.copy(),
    response=rng.integers(0, VOCAB, (*shape, R)),
    response_mask=np.arange(R) < lengths[..., None],
  )


def make_batch(kind: str, seed: int = 0) -> Any:
  """A batch as NumPy arrays.

  Pairs have hard labels, a soft one and a tie; rankings have ties and places that are not there;
  rollouts with values have a value mask one step longer, as with scores paid after the stop.
  """
  rng = np.random.default_rng(seed)
  shape = SHAPES.get(kind, (B,))
  sequences = make_sequences(rng, shape)
  mask = sequences.response_mask

  def normal(*shape: int) -> np.ndarray:
    return rng.normal(0, 1, shape).astype(np.float32)

  reference = -1.5 + 0.3 * normal(*shape, R)
  if kind == 'demonstrations':
    return sequences
  if kind == 'comparisons':
    preference = np.array([1.0, 0.8, 0.5, 1.0], np.float32)
    return Pairs(sequences, preference, np.array([0.5, 0.0, 0.2, 1.5], np.float32), reference)
  if kind == 'online_pairs':
    # The second group's scores were all alike.
    return Pairs(
      sequences, np.ones(B, np.float32), np.array([0.5, 0.0, 0.2, 1.5], np.float32), reference
    )
  score = np.array([1.5, -0.5, 0.0, 0.25], np.float32)
  if kind == 'ratings':
    return Ratings(sequences, score, reference)
  if kind == 'referenced_ratings':
    return ReferencedRatings(Ratings(sequences, score, reference), jnp.full(B, 0.3))
  if kind == 'rankings':
    rank = np.array([[2, 1, 3], [1, 1, 2], [1, 2, 1], [1, 2, 2]])
    there = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1]], bool)
    return Rankings(sequences, rank, there, reference)
  if kind == 'step_ratings':
    ends = mask & np.array([[0, 1, 0, 1], [1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]], bool)
    return StepRatings(sequences, normal(B, R), ends)
  rollouts = Rollouts(
    sequences=sequences,
    old_logprobs=-1.6 + 0.3 * normal(B, R),
    reference_logprobs=reference,
    advantages=np.where(mask, normal(B, R if kind == 'valued_rollouts' else 1), 0.0),
  )
  if kind == 'rollouts':
    return rollouts
  assert kind == 'valued_rollouts', kind
  last = mask.sum(-1, keepdims=True)
  return dataclasses.replace(
    rollouts,
    old_values=normal(B, R),
    returns=normal(B, R),
    value_mask=np.arange(R) <= last,
    value_scale=np.full(B, 0.7, np.float32),
  )


def sequences_of(batch: Any) -> Sequences:
  """The prompts and responses of a batch."""
  if isinstance(batch, ReferencedRatings):
    batch = batch.ratings
  return batch if isinstance(batch, Sequences) else batch.sequences


def token_mask(batch: Any) -> Any:
  """`[..., R]`: the response tokens that may matter, those of responses that are there."""
  mask = sequences_of(batch).response_mask
  return mask & batch.mask[..., None] if isinstance(batch, Rankings) else mask


def texts_of(config: ObjectiveConfig, batch: Any) -> Sequences:
  """What a config's loss asks a policy about: the responses, or with them their prompts."""
  sequences = sequences_of(batch)
  whole = isinstance(config, ORPOConfig) and config.prompt_nll
  return as_responses(sequences)[0] if whole else sequences


def masks_of(config: ObjectiveConfig, batch: Any) -> dict[str, Any]:
  """Which outputs of `DIRECT` may matter to a config's loss, by name."""
  tokens: Any = np.asarray(texts_of(config, batch).response_mask)
  if isinstance(batch, Rankings):
    tokens = token_mask(batch)
  elif isinstance(batch, StepRatings) and getattr(config, 'between', None) != 'zero':
    tokens = batch.score_mask
  q_names = ('next_values', 'target_q')
  masks = dict.fromkeys(('logprobs', 'entropy', 'values', *q_names), tokens)
  if isinstance(batch, Rollouts) and batch.value_mask is not None:
    masks['values'] = batch.value_mask
  masks |= dict.fromkeys(('q', 'q_nll'), np.stack([tokens, tokens]))
  masks['scores'] = batch.mask if isinstance(batch, Rankings) else tokens.any(-1)
  masks['token_scores'] = tokens
  return masks


def numbers_of(batch: Any) -> dict[str, np.ndarray]:
  """The fields `[..., R]` of a batch that hold numbers, by name, with the masks they have."""
  if isinstance(batch, StepRatings):
    return {'score': batch.score_mask}
  tokens = token_mask(batch)
  names = ('reference_logprobs', 'old_logprobs', 'advantages', 'old_values', 'returns')
  numbers = {name: tokens for name in names if getattr(batch, name, None) is not None}
  if 'returns' in numbers:
    numbers |= dict.fromkeys(('old_values', 'returns'), batch.value_mask)
  return numbers


def garbage(batch: Any, bad: float, token: int) -> Any:
  """The batch with `bad` at every masked number and `token` at every masked token."""
  if isinstance(batch, ReferencedRatings):
    return dataclasses.replace(batch, ratings=garbage(batch.ratings, bad, token))
  rows = sequences_of(batch)
  spoiled = dataclasses.replace(
    rows,
    prompt=np.where(rows.prompt_mask, rows.prompt, token),
    response=np.where(token_mask(batch), rows.response, token),
  )
  if isinstance(batch, Sequences):
    return spoiled
  numbers = {
    name: np.where(mask, getattr(batch, name), np.float32(bad))
    for name, mask in numbers_of(batch).items()
  }
  return dataclasses.replace(batch, sequences=spoiled, **numbers)


def pad(batch: Any, left: int, right: int) -> Any:
  """The batch with more padding: `left` prompt columns and `right` response columns."""

  def widen(x: Any, before: int, after: int) -> Any:
    # Tokens and numbers are padded with 1, masks with False.
    fill = False if x.dtype == bool else 1
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, after)], constant_values=fill)

  if isinstance(batch, ReferencedRatings):
    return dataclasses.replace(batch, ratings=pad(batch.ratings, left, right))
  if isinstance(batch, Sequences):
    return Sequences(
      prompt=widen(batch.prompt, left, 0),
      prompt_mask=widen(batch.prompt_mask, left, 0),
      response=widen(batch.response, 0, right),
      response_mask=widen(batch.response_mask, 0, right),
    )
  names = {*numbers_of(batch), 'value_mask', 'score_mask'} & set(vars(batch))
  per_token = {
    name: widen(getattr(batch, name), 0, right)
    for name in names
    if getattr(batch, name) is not None
  }
  return dataclasses.replace(batch, sequences=pad(batch.sequences, left, right), **per_token)


def swap(pairs: Pairs) -> Pairs:
  """The same comparisons with first and second exchanged, labels too."""
  exchanged = jax.tree.map(lambda x: x[:, ::-1], (pairs.sequences, pairs.reference_logprobs))
  return dataclasses.replace(
    pairs,
    sequences=exchanged[0],
    reference_logprobs=exchanged[1],
    preference=1 - pairs.preference,
  )


def reorder(rankings: Rankings, order: Any) -> Rankings:
  """The same rankings with their responses listed in another order, ranks too."""
  return jax.tree.map(lambda x: x[:, order], rankings)


def without_reference(batch: Any) -> Any:
  """The batch before anybody asked for the reference's log-probs."""
  if isinstance(batch, ReferencedRatings):
    return dataclasses.replace(batch, ratings=without_reference(batch.ratings))
  return dataclasses.replace(batch, reference_logprobs=None)
